"""The promise itself, on a real process: requests with budgets get the level that keeps them."""

from __future__ import annotations

import re
import threading
import time

import httpx
import openai
import psutil
import pytest

from tests.support.gateway_process import GatewayProcess

pytestmark = pytest.mark.slow


def test_a_plain_request_is_served_by_a_near_lossless_level(gateway: GatewayProcess) -> None:
    answer = gateway.complete()
    facts = answer["compression"]
    assert facts["level"] in ("bf16", "fp32", "int8")
    assert facts["policy"] == "default"
    assert facts["reason"].endswith(".")
    assert answer["usage"]["completion_tokens"] == 8
    assert facts["measured"]["ttft_ms"] > 0


def test_a_memory_budget_gets_a_smaller_level_built_on_the_fly(gateway: GatewayProcess) -> None:
    assert gateway.level("int8")["state"] == "absent"
    answer = gateway.complete(sla={"memory_mb": 25, "on_miss": "wait"})
    assert answer["compression"]["level"] == "int8"
    row = gateway.level("int8")
    assert row["state"] == "ready"
    assert row["measured"] is True
    assert row["stored_bytes"] < 22e6
    assert row["perplexity_ratio"] < 1.01
    jobs = [job for job in gateway.get("/v1/jobs")["data"] if job["level"] == "int8"]
    assert [job["state"] for job in jobs] == ["done"]


def test_different_budgets_get_different_levels_with_reasons(gateway: GatewayProcess) -> None:
    asked = {
        "loose": {},
        "strict quality": {"max_ppl_ratio": 1.0, "min_agreement": 1.0},
        "tight memory": {"policy": "compact", "memory_mb": 17},
    }
    got = {name: gateway.complete(sla=sla)["compression"] for name, sla in asked.items()}
    assert got["strict quality"]["level"] in ("bf16", "fp32")
    assert got["tight memory"]["level"].startswith("int4")
    assert got["tight memory"]["predicted"]["memory_mb"] <= 17
    assert len({facts["level"] for facts in got.values()}) >= 2
    assert all(len(facts["reason"]) > 10 for facts in got.values())


def test_every_level_answers_and_the_better_ones_agree_with_dense(gateway: GatewayProcess) -> None:
    for level in ("fp32", "int4-rtn-g64", "int4-gptq-g128", "depth-75"):
        gateway.complete(model=f"docs-17m@{level}", sla={"on_miss": "wait"})
    rows = {row["level"]: row for row in gateway.get("/v1/levels")["data"]}
    assert all(rows[level]["measured"] for level in rows)
    assert rows["int8"]["kl_nats"] < rows["int4-gptq-g128"]["kl_nats"]
    assert (
        rows["int4-gptq-g128"]["perplexity_ratio"] < rows["int4-rtn-g64"]["perplexity_ratio"] + 0.02
    )
    assert rows["int4-rtn-g64"]["stored_bytes"] < 0.45 * rows["bf16"]["stored_bytes"]
    assert rows["depth-75"]["flops_per_token"] < rows["bf16"]["flops_per_token"]
    for row in rows.values():
        assert row["decode_tokens_per_s"].keys() == {"1", "8"}
        assert row["prefill_tokens_per_s"] > 0


def test_explain_names_every_level_and_generates_nothing(gateway: GatewayProcess) -> None:
    before = _metric(gateway, r"pressgate_generation_tokens_total\{.*\} ([0-9.e+]+)")
    body = {"model": "docs-17m", "prompt": "x", "sla": {"max_ppl_ratio": 1.01}}
    answer = gateway.post("/v1/explain", body)
    assert {row["level"] for row in answer["levels"]} == {
        row["level"] for row in gateway.get("/v1/levels")["data"]
    }
    refused = [row for row in answer["levels"] if not row["ok"]]
    assert refused
    assert all("1.01" in row["why"] for row in refused if "max_ppl_ratio" in row["misses"])
    assert _metric(gateway, r"pressgate_generation_tokens_total\{.*\} ([0-9.e+]+)") == before


def test_a_budget_that_nothing_keeps_is_refused_with_what_could_be_met(
    gateway: GatewayProcess,
) -> None:
    sla = {"memory_mb": 1, "on_miss": "reject"}
    error = gateway.complete(status=422, sla=sla)["error"]
    assert error["code"] == "budget_unmet"
    assert error["could_meet"]["memory_mb"] > 1


def test_many_requests_at_several_levels_at_once(gateway: GatewayProcess) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=120)
    alone = {
        level: _greedy(client, f"docs-17m@{level}") for level in ("bf16", "int8", "int4-rtn-g64")
    }
    results: dict[int, tuple[str, str]] = {}

    def run(index: int, level: str) -> None:
        results[index] = (level, _greedy(client, f"docs-17m@{level}"))

    levels = [*alone] * 4
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(levels)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(levels)
    # bf16 sums in another order in another batch: the beginning must agree, the tail may part.
    assert all(text[:20] == alone[level][:20] for level, text in results.values())


def test_a_stream_carries_the_decision_at_its_end(gateway: GatewayProcess) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=120)
    stream = client.chat.completions.create(
        model="docs-17m",
        messages=[{"role": "user", "content": "What does the function return?"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    extras = [chunk.model_extra or {} for chunk in chunks]
    facts = next(extra["compression"] for extra in extras if extra.get("compression"))
    assert facts["level"]
    assert any(chunk.usage and chunk.usage.completion_tokens <= 12 for chunk in chunks)


def test_live_quality_is_scored_by_the_dense_level(gateway: GatewayProcess) -> None:
    label = r'\{level="int8",model="docs-17m"\}'
    tokens = rf"pressgate_shadow_tokens_total{label} (\S+)"
    before = _metric(gateway, tokens)
    gateway.complete(model="docs-17m@int8", prompt="The handle to the window", max_tokens=32)
    until = time.monotonic() + 60
    while _metric(gateway, tokens) < before + 16:
        assert time.monotonic() < until, "nothing was scored"
        time.sleep(0.1)
    agreeing = _metric(gateway, rf"pressgate_shadow_agreements_total{label} (\S+)")
    assert 0.8 <= agreeing / _metric(gateway, tokens) <= 1.0, "greedy int8 is nearly dense"


def test_memory_stays_within_the_budget(gateway: GatewayProcess) -> None:
    """Weights plus KV as the process itself counts them, and what the system says it holds."""
    text = httpx.get(f"{gateway.url}/metrics").text
    used = float(re.search(r"^pressgate_memory_used_bytes (\S+)", text, re.M)[1])  # type: ignore[index]
    budget = float(re.search(r"^pressgate_memory_budget_bytes (\S+)", text, re.M)[1])  # type: ignore[index]
    assert 0 < used <= budget
    resident = psutil.Process(gateway.pid).memory_info().rss
    runtime = 700e6  # Python, torch and transformers before any weight
    assert resident < runtime + budget


def _greedy(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(
        model=model, prompt="The handle to the", max_tokens=12, temperature=0
    )
    return answer.choices[0].text


def _metric(gateway: GatewayProcess, pattern: str) -> float:
    found = re.findall(pattern, httpx.get(f"{gateway.url}/metrics").text)
    return sum(map(float, found))
