"""Policies, explanations, levels, jobs, health and metrics over a real port."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import FakeModel
from gateway.policy.policy import Policy
from tests.support.fake_pool import LEVELS, MODEL, Gateway, make_settings
from tests.support.live import LiveServer

TEXT, EXPLAIN = "/v1/completions", "/v1/explain"


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", "max_tokens": 4} | fields


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[tuple[Gateway, httpx.Client]]:
    """A gateway of the test's own whose builds take 0.3 s; `default` may build."""
    busy = Policy(name="default", expected_requests=10**6)  # so that every build pays
    policies = (busy, Policy(name="strict", max_ppl_ratio=1.0, build=False))
    gateway = Gateway(
        make_settings(policies=policies),
        options=FakeModel(tpot_ms=0.2, build_seconds=0.3),
        models=getattr(request, "param", (MODEL,)),
    )
    with (
        LiveServer(gateway.open) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield gateway, client


# -- policies -----------------------------------------------------------------------------------


def test_a_policy_lives_from_put_to_delete(own: tuple[Gateway, httpx.Client]) -> None:
    _, http = own
    rules = {"ttft_ms": 500, "levels": ["int8", "bf16"], "on_miss": "reject"}
    put = http.put("/v1/policies/mine", json=rules)
    assert put.status_code == 200
    assert put.json()["name"] == "mine"
    assert http.get("/v1/policies/mine").json() == put.json()
    assert "mine" in [p["name"] for p in http.get("/v1/policies").json()["data"]]
    answer = http.post(TEXT, json=text(), headers={"x-pressgate-policy": "mine"}).json()
    assert answer["compression"]["policy"] == "mine"
    assert http.delete("/v1/policies/mine").status_code == 204
    assert http.get("/v1/policies/mine").status_code == 404
    gone = http.post(TEXT, json=text(sla={"policy": "mine"}))
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("name", "rules", "field"),
    [
        ("p", {"ttft_ms": -1}, "ttft_ms"),
        ("p", {"ttfb_ms": 1}, "ttfb_ms"),
        ("p", {"on_miss": "panic"}, "on_miss"),
        ("p", {"match": {"colour": "red"}}, "match.colour"),
        ("p", {"name": "q"}, "name"),
        ("Not%20A%20Name", {}, "name"),
    ],
)
def test_bad_policies_name_the_key_and_change_nothing(
    http: httpx.Client, name: str, rules: dict[str, Any], field: str
) -> None:
    before = http.get("/v1/policies").json()
    response = http.put(f"/v1/policies/{name}", json=rules)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert field in response.json()["error"]["message"]
    assert http.get("/v1/policies").json() == before


# -- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "header", "expected"),
    [(400, "300", 300), (200, "300", 200), (None, "300", 300), (400, None, 400)],
    ids=["header-tighter", "body-tighter", "header-only", "body-only"],
)
def test_the_tighter_of_body_and_header_wins(
    http: httpx.Client, body: float | None, header: str | None, expected: float
) -> None:
    sla = {"sla": {"ttft_ms": body}} if body else {}
    headers = {"x-slo-ttft-ms": header} if header else {}
    shown = http.post(EXPLAIN, json=text(**sla), headers=headers).json()
    assert shown["budget"] == {"ttft_ms": expected}


def test_policy_of_the_body_goes_before_the_header(own: tuple[Gateway, httpx.Client]) -> None:
    _, http = own
    headers = {"x-pressgate-policy": "default"}
    shown = http.post(EXPLAIN, json=text(sla={"policy": "strict"}), headers=headers).json()
    assert shown["policy"] == "strict"


def test_slo_met_is_judged_by_what_was_measured(http: httpx.Client) -> None:
    """40 tokens of 0.2 ms and more cannot be had in 1 ms, whatever was predicted."""
    tight = http.post(TEXT, json=text(max_tokens=40, sla={"latency_ms": 1})).json()["compression"]
    assert tight["measured"]["latency_ms"] > 1
    assert tight["slo_met"] is False
    loose = http.post(TEXT, json=text(sla={"latency_ms": 60_000})).json()["compression"]
    assert loose["slo_met"] is True
    assert loose["decision_id"] != tight["decision_id"]


def test_a_budget_nothing_can_meet_is_refused_with_what_could_be(http: httpx.Client) -> None:
    sla = {"memory_mb": 0.001, "on_miss": "reject"}
    response = http.post(TEXT, json=text(sla=sla))
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "budget_unmet"
    assert error["could_meet"]["memory_mb"] > 0.001


# -- explain ------------------------------------------------------------------------------------


def test_explain_shows_every_level_and_starts_nothing(own: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = own
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    for body in (text(), chat):
        shown = http.post(EXPLAIN, json=body | {"sla": {"memory_mb": 20, "on_miss": "wait"}})
        assert shown.status_code == 200
        assert {entry["level"] for entry in shown.json()["levels"]} == {"bf16", *LEVELS}
        assert all(entry["why"] for entry in shown.json()["levels"])
        assert shown.json()["decision"]["action"] == "wait"
    assert gateway.pool.jobs() == []
    assert gateway.backend.seen == []
    assert "pressgate_decisions_total{" not in http.get("/metrics").text


def test_explain_and_the_answer_agree(http: httpx.Client) -> None:
    shown = http.post(EXPLAIN, json=text()).json()
    served = http.post(TEXT, json=text())
    assert served.headers["x-pressgate-level"] == shown["decision"]["level"]
    assert served.json()["compression"]["policy"] == shown["policy"]


# -- on the fly, levels and jobs ----------------------------------------------------------------


def test_a_request_that_waits_gets_the_level_it_needs(own: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = own
    sla = {"memory_mb": 20, "on_miss": "wait"}
    answer = http.post(TEXT, json=text(sla=sla))
    assert answer.status_code == 200
    assert answer.headers["x-pressgate-level"] in LEVELS
    [job] = http.get("/v1/jobs").json()["data"]
    assert (job["state"], job["progress"]) == ("done", 1.0)
    assert job["level"] == answer.headers["x-pressgate-level"]
    assert http.get(f"/v1/jobs/{job['id']}").json() == job
    assert gateway.settles()


def test_a_request_that_does_not_wait_is_told_when_to_come_back(
    own: tuple[Gateway, httpx.Client],
) -> None:
    _, http = own
    sla = {"memory_mb": 20, "on_miss": "reject"}
    first = http.post(TEXT, json=text(sla=sla))
    assert first.status_code == 503
    assert first.json()["error"]["code"] == "building"
    assert int(first.headers["retry-after"]) >= 1
    wait_until(lambda: http.post(TEXT, json=text(sla=sla)).status_code == 200)


def test_build_warm_evict(own: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = own
    started = http.post("/v1/levels/int8:build")
    assert started.status_code == 202
    assert started.json()["state"] in ("queued", "running")
    again = http.post("/v1/levels/int8:build")
    assert again.json()["id"] == started.json()["id"]
    job = f"/v1/jobs/{started.json()['id']}"
    wait_until(lambda: http.get(job).json()["state"] == "done")
    assert state_of(http, "int8") == "stored"
    assert http.post("/v1/levels/int8:build").status_code == 409
    assert http.post("/v1/levels/int8:warm").json()["state"] == "ready"
    assert http.post("/v1/levels/int8:evict").json()["state"] == "stored"
    assert gateway.settles()


def test_pin_keeps_a_level_and_memory_explains_itself(own: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = own
    assert http.post("/v1/levels/int8:pin").json()["pinned"] is True
    assert http.post("/v1/levels/int8:evict").status_code == 409
    memory = http.get("/v1/memory").json()
    rows = {row["level"].rpartition("@")[2]: row for row in memory["levels"]}
    assert rows["int8"]["kept"] == "pinned"
    assert rows["int8"]["leaves"] is None
    assert memory["weight_bytes"] <= memory["weight_budget_bytes"] <= memory["budget_bytes"]
    assert http.post("/v1/levels/int8:unpin").json()["pinned"] is False
    assert http.post("/v1/levels/int8:evict").json()["state"] == "stored"
    assert http.post("/v1/levels/nope:pin").status_code == 404
    assert gateway.settles()


def test_levels_carry_the_card(http: httpx.Client) -> None:
    ladder = http.get("/v1/levels").json()
    assert ladder["memory_budget_bytes"] == 10**9
    [dense] = [row for row in ladder["data"] if row["level"] == "bf16"]
    for name in (
        "state", "family", "stored_bytes", "resident_bytes", "compression_ratio",
        "perplexity_ratio", "kl_nats", "top1_agreement", "prefill_tokens_per_s",
        "decode_tokens_per_s", "speedup", "build_seconds", "load_seconds",
    ):  # fmt: skip
        assert name in dense


@pytest.mark.parametrize("own", [("one", "two")], indirect=True)
def test_with_several_models_a_level_needs_its_model(own: tuple[Gateway, httpx.Client]) -> None:
    _, http = own
    response = http.post("/v1/levels/int8:build")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert http.post("/v1/levels/int8:build?model=two").json()["model"] == "two"
    assert {row["model"] for row in http.get("/v1/levels").json()["data"]} == {"one", "two"}
    assert {row["model"] for row in http.get("/v1/levels?model=one").json()["data"]} == {"one"}


def state_of(http: httpx.Client, level: str) -> str:
    rows = http.get("/v1/levels").json()["data"]
    return next(str(row["state"]) for row in rows if row["level"] == level)


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


# -- health and metrics -------------------------------------------------------------------------


def test_health_and_readiness(own: tuple[Gateway, httpx.Client]) -> None:
    _, http = own
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}
    assert http.post("/v1/levels/bf16:evict").status_code == 200
    assert http.get("/readyz").status_code == 200  # the next request loads it again
    assert http.post(TEXT, json=text()).status_code == 200


def test_not_ready_before_the_default_level_is_loaded(own: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = own
    gateway.pool._loaded_defaults = False  # as between start and the end of the first load
    down = http.get("/readyz")
    assert down.status_code == 503
    assert int(down.headers["retry-after"]) >= 1


def test_a_served_request_shows_in_the_metrics(own: tuple[Gateway, httpx.Client]) -> None:
    _, http = own
    sla = {"ttft_ms": 30_000, "tpot_ms": 30_000}
    assert http.post(TEXT, json=text(sla=sla, max_tokens=7)).status_code == 200
    assert http.post(TEXT, json=text(max_tokens=-1)).status_code == 400
    assert http.post(TEXT, json=text(model=f"{MODEL}@nope")).status_code == 404
    got = {
        (sample.name, sample.labels.get("code", "")): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    assert got["pressgate_requests_total", "200"] == 1
    assert got["pressgate_requests_total", "400"] == 1
    assert got["pressgate_requests_total", "404"] == 1
    assert got["pressgate_generation_tokens_total", ""] == 7
    assert got["pressgate_slo_met_total", ""] == 1
    for name in (
        "time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_latency_seconds",
        "queue_seconds", "predicted_ttft_seconds", "prediction_error_ratio",
    ):  # fmt: skip
        assert got[f"pressgate_{name}_count", ""] >= 1


def test_the_predictor_learns_from_answers(own: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = own
    for _ in range(5):
        http.post(TEXT, json=text(max_tokens=8))
    wait_until(lambda: gateway.services.predictor.error(MODEL, "bf16").observations == 5)


def test_openapi_describes_every_endpoint_and_no_reference_dangles(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert "#/$defs" not in http.get("/openapi.json").text
    for path in (TEXT, "/v1/chat/completions", EXPLAIN):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert "sla" in content["application/json"]["schema"]["properties"]
    assert "/v1/levels/{name}:build" in document["paths"]


def test_evict_can_forget_the_artifact_too(own: tuple[Gateway, httpx.Client]) -> None:
    _, http = own
    assert http.post(f"/v1/levels/{LEVELS[1]}:warm").status_code == 200
    evicted = http.post(f"/v1/levels/{LEVELS[1]}:evict", params={"delete": "true"})
    assert evicted.status_code == 200
    assert evicted.json()["state"] == "absent"
