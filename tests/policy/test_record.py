"""Kept decisions: what is read back explains what was decided, as if it had just been decided."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.policy.budget import Sla
from gateway.policy.decide import Ask, decide
from gateway.policy.explain import explanation
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.policy.record import Codec, Record, Result, render
from gateway.variants.variant import LadderSnapshot, State
from tests.policy.ladders import busy, card, ladder, with_level
from tests.policy.test_decide_properties import ladders, policies, slas


def kept(
    snapshot: LadderSnapshot,
    policy: Policy,
    ask: Ask,
    predictor: Predictor | None = None,
    **more: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(explained at once, explained from what was kept)."""
    decision = decide(ask, policy, snapshot, (predictor or Predictor()).predict)
    told = explanation(ask, policy, decision, snapshot)
    found = render(*Codec().encode(Record("dec-1", 5.0, "me", "/v1/x", decision, **more)))
    return told, found


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(snapshot=ladders(), policy=policies(), sla=slas(), prompt=st.integers(1, 3000))
def test_what_is_read_back_is_what_was_decided(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, prompt: int
) -> None:
    told, found = kept(snapshot, policy, Ask("m", prompt, 40, None, sla))
    assert {name: found[name] for name in told} == told


def test_after_learning_too() -> None:
    predictor, snapshot = Predictor(), with_level(ladder(), "bf16", stats=busy(3, 2, 900, 300))
    snapshot = with_level(snapshot, "int4", state=State.STORED)
    policy = Policy(name="p", confidence=0.93, tpot_ms=20)
    for _ in range(50):
        for row, level in enumerate(("fp32", "bf16", "int8")):
            said = predictor.predict(100, 100, snapshot)[row]
            predictor.observe("m", level, said, ttft_ms=said.ttft_ms * 1.4, tpot_ms=said.tpot_ms)
    told, found = kept(snapshot, policy, Ask("m", 700, 40, None, Sla(ttft_ms=900)), predictor)
    assert {name: found[name] for name in told} == told
    assert (
        found["levels"][2]["predicted"]["ttft_high_ms"] > found["levels"][2]["predicted"]["ttft_ms"]
    )


def test_what_became_of_it_is_told_promise_by_promise() -> None:
    result = Result(
        200, "int8", 12, {"ttft_ms": 31.0, "tpot_ms": 9.0, "latency_ms": 130.0}, ("tpot_ms",), 0.14
    )
    ask = Ask("m", 100, 100, None, Sla(ttft_ms=100, tpot_ms=8))
    _, found = kept(ladder(), Policy(name="p"), ask, result=result)
    assert found["result"] == {
        "code": 200,
        "level": "int8",
        "levels": None,
        "generated_tokens": 12,
        "measured": {"ttft_ms": 31.0, "tpot_ms": 9.0, "latency_ms": 130.0},
        "seconds": 0.14,
        "slo_met": False,
        "promises": {
            "ttft_ms": {"bound": 100.0, "measured": 31.0, "kept": True},
            "tpot_ms": {"bound": 8.0, "measured": 9.0, "kept": False},
        },
    }
    _, running = kept(ladder(), Policy(name="p"), ask)
    assert running["result"] is None
    assert (running["id"], running["created"], running["key"]) == ("dec-1", 5.0, "me")


def test_cards_that_are_not_finite_survive() -> None:
    ruined = card(12, math.inf, 0.0, 1000, 4, kl_nats=math.nan)
    snapshot = with_level(ladder(), "int4", card=ruined)
    told, found = kept(snapshot, Policy(name="p"), Ask("m", 10, 10))
    assert found["levels"] == told["levels"]
    assert found["levels"][3]["perplexity_ratio"] == math.inf


def test_what_another_version_kept_is_told_as_far_as_it_is_true() -> None:
    decision = decide(Ask("m", 10, 10), Policy(name="p"), ladder(), Predictor().predict)
    data, shared = Codec().encode(Record("dec-1", 5.0, None, "", decision))
    document = json.loads(zlib.decompress(data))
    document["decision"]["level"] = "sparse24"  # which today's rules would not choose
    other = render(zlib.compress(json.dumps(document).encode()), shared)
    assert other["decision"]["level"] == "sparse24"
    assert (other["levels"], other["counterfactuals"]) == (None, None)
    document["ask"]["wishes"] = 3
    del document["snapshot"]["memory_budget"]
    unknown = render(zlib.compress(json.dumps(document).encode()), shared)
    assert unknown["decision"]["level"] == "sparse24"
    assert unknown["levels"] is None


def test_what_the_queue_refused_keeps_its_verdicts() -> None:
    decision = decide(Ask("m", 10, 10), Policy(name="p"), ladder(), Predictor().predict)
    refused = replace(decision, action="reject", code="busy", level=None, retry_after_s=3.0)
    found = render(*Codec().encode(Record("dec-1", 5.0, None, "", refused)))
    assert found["decision"]["action"] == "reject"
    assert found["decision"]["retry_after_s"] == 3.0
    assert len(found["levels"]) == len(ladder().levels)
    assert found["counterfactuals"] is None


def test_records_are_small_and_share_what_is_common() -> None:
    codec, policy, snapshot, predict = Codec(), Policy(name="p"), ladder(), Predictor().predict
    pairs = [
        codec.encode(
            Record(
                "dec-1",
                5.0,
                "me",
                "/v1/x",
                decide(Ask("m", n, 10), policy, snapshot, predict),
            )
        )
        for n in range(1, 40)
    ]
    assert len({shared for _, shared in pairs}) == 1
    assert max(len(data) for data, _ in pairs) < 250 * len(snapshot.levels)


@pytest.mark.parametrize("levels", [0, 5])
def test_no_more_than_lengths_is_kept_of_a_prompt(levels: int) -> None:
    snapshot = ladder() if levels else LadderSnapshot("m", (), 10**9, 0)
    _, found = kept(snapshot, Policy(name="p"), Ask("m", 10, 10), text=(((1, 2),), ((3,),)))
    assert "text" not in found
    assert found["prompt_tokens"] == 10
