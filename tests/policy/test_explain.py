"""Explanations: every level, its numbers and its verdict, as JSON."""

from __future__ import annotations

import json
from typing import Any

from gateway.policy.budget import Sla
from gateway.policy.decide import Ask, decide
from gateway.policy.explain import explanation
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.variant import State
from tests.policy.ladders import CARDS, ladder, with_level


def explain(policy: Policy, **sla: Any) -> dict[str, Any]:
    snapshot = ladder({"int4": State.ABSENT})
    snapshot = with_level(snapshot, "sparse24", state=State.FAILED, error="no memory")
    ask = Ask("m", 100, 100, None, Sla(**sla))
    decision = decide(ask, policy, snapshot, Predictor().predict)
    told = explanation(ask, policy, decision, snapshot)
    assert json.loads(json.dumps(told)) == told
    return told


def test_a_choice_is_explained() -> None:
    told = explain(Policy(name="p", confidence=0.5, max_ppl_ratio=1.1), tpot_ms=7, on_miss="wait")
    assert told["budget"] == {"tpot_ms": 7, "max_ppl_ratio": 1.1}
    assert (told["policy"], told["objective"], told["on_miss"]) == ("p", "quality", "wait")
    assert told["decision"]["level"] == "int8"
    assert told["decision"]["predicted"] == {
        "ttft_ms": 33.3,
        "tpot_ms": 6.0,
        "latency_ms": 627.3,
        "memory_mb": 20.2,
        "ttft_high_ms": 33.3,
        "tpot_high_ms": 6.0,
        "latency_high_ms": 627.3,
        "confidence": 0.5,
        "output_tokens": 100.0,
    }
    by_level = {entry["level"]: entry for entry in told["counterfactuals"]["levels"]}
    assert set(by_level) == set(CARDS) - {"int8"}
    (sentence, _) = by_level["bf16"]["sentences"]
    assert sentence == "With 3 ms more per token, you would have got bf16."
    levels = {entry["level"]: entry for entry in told["levels"]}
    assert list(levels) == list(CARDS)
    assert levels["fp32"]["why"] == "time per token 20 is above 7 ms"
    assert levels["bf16"]["misses"] == ["tpot_ms"]
    assert levels["int8"]["why"] == "fits"
    assert levels["int4"]["why"] == "would fit; has to be built first (about 20.2 s)"
    assert levels["int4"]["state"] == "absent"
    assert levels["sparse24"]["why"] == "failed: no memory"
    assert [name for name, entry in levels.items() if entry["ok"]] == ["int8", "int4"]


def test_a_refusal_is_explained() -> None:
    told = explain(Policy(name="p", confidence=0.5), tpot_ms=0.5, on_miss="reject")
    assert told["decision"]["action"] == "reject"
    assert told["decision"]["level"] is None
    assert told["decision"]["could_meet"] == {"tpot_ms": 6.0}
    assert told["decision"]["retry_after_s"] is None
