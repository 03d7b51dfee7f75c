"""Counterfactuals: whatever they claim, the real decision does when it is given that budget."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from gateway.policy.budget import Budget, Sla
from gateway.policy.counterfactual import counterfactuals, told
from gateway.policy.decide import Ask, Decision, decide
from gateway.policy.moment import Moment
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.variant import LadderSnapshot, State
from tests.policy.ladders import ladder
from tests.policy.test_decide_properties import NAMES, ladders, policies, slas

RATIOS = ("max_ppl_ratio", "min_agreement")  # rounded to a thousandth; all else to three digits


def explained(
    snapshot: LadderSnapshot, policy: Policy, ask: Ask, predictor: Predictor | None = None
) -> tuple[Decision, dict[str, Any]]:
    predict = (predictor or Predictor()).predict
    decision = decide(ask, policy, snapshot, predict)
    assert decision.case is not None
    found = told(counterfactuals(decision.case, decision), decision, decision.case)
    assert json.loads(json.dumps(found)) == found
    return decision, found


def asked(**sla: Any) -> Ask:
    return Ask("m", 100, 100, None, Sla(**sla))


def of(found: dict[str, Any], level: str) -> dict[str, Any]:
    return next(one for one in found["levels"] if one["level"] == level)


def short_of(name: str, bound: float, start: float) -> float | None:
    """A bound that is tighter than `bound` by more than it is rounded, on the way to `start`."""
    if name in RATIOS:
        step = 0.0011 if name == "min_agreement" else -0.0011
        return bound + step if abs(bound - start) > 0.0011 else None
    return start + (bound - start) * 0.97 if bound > 0.01 else None


def gets(decision: Decision, level: str) -> bool:
    return (decision.level or decision.build) == level and not decision.misses


@st.composite
def moments(draw: st.DrawFn) -> Moment:
    """Others were promised something, or this kind of request had a level, more often than not."""
    return Moment(
        waited_ms=draw(st.just(0.0) | st.floats(0, 500)),
        token_ms=draw(st.just(math.inf) | st.floats(5, 100)),
        slack_ms=draw(st.just(math.inf) | st.floats(5, 2000)),
        recent=draw(st.none() | st.sampled_from(NAMES)),
        settling=draw(st.booleans()),
    )


def test_a_little_more_time_would_have_got_a_better_level() -> None:
    policy = Policy(name="p", confidence=0.5)
    decision, found = explained(ladder(), policy, asked(tpot_ms=7.0, ttft_ms=1000))
    assert decision.level == "int8"
    bf16 = of(found, "bf16")
    assert bf16["relaxed"] == {
        "bounds": {"tpot_ms": 10.0},
        "budget": {"ttft_ms": 1000.0, "tpot_ms": 10.0},
        "needs_policy": False,
    }
    assert bf16["sentences"][0] == "With 3 ms more per token, you would have got bf16."
    assert bf16["cheapest"] is not None
    assert of(found, "sparse24")["relaxed"] is None, "it fits already, and is no better"
    by_bound = {one["bound"]: one for one in found["tighter"]}
    assert by_bound["tpot_ms"]["at"] < 6.0
    assert by_bound["tpot_ms"]["level"] == "int4"
    assert by_bound["tpot_ms"]["sentence"].endswith(
        "you would have got int4 (perplexity ratio 1.055)."
    )


def test_a_bound_of_the_policy_is_the_policys_word() -> None:
    policy = Policy(name="gold", tpot_ms=7.0, confidence=0.5)
    _, found = explained(ladder(), policy, asked())
    relaxed = of(found, "bf16")["relaxed"]
    assert relaxed["needs_policy"]
    (sentence,) = of(found, "bf16")["sentences"]
    assert sentence == "Had policy gold allowed 3 ms more per token, you would have got bf16."


def test_a_level_asked_for_by_name_is_told_what_it_stands_for() -> None:
    ask = replace(asked(tpot_ms=7.0), pinned_level="fp32")
    _, found = explained(ladder(), Policy(name="p", confidence=0.5), ask)
    assert (found["levels"], found["tighter"]) == ([], [])
    assert found["unpinned"]["sentence"] == "Had no level been named, you would have got int8."


def test_a_level_to_be_built_is_got_by_waiting_only() -> None:
    absent = ladder({"int4": State.ABSENT})
    _, found = explained(absent, Policy(name="p"), asked(memory_mb=15.0, on_miss="nearest"))
    assert 34 < of(found, "bf16")["relaxed"]["bounds"]["memory_mb"] < 35
    assert of(found, "fp32")["relaxed"] is None, "bf16 is as good and smaller"
    _, patient = explained(absent, Policy(name="p"), asked(latency_ms=2000.0, on_miss="wait"))
    cheapest = of(patient, "int4")["cheapest"]
    assert cheapest is None or cheapest["ttft_ms"] > 20_000


def test_a_refusal_says_what_would_have_been_served() -> None:
    decision, found = explained(ladder(), Policy(name="p"), asked(tpot_ms=0.5, on_miss="reject"))
    assert decision.action == "reject"
    assert {one["level"] for one in found["levels"] if one["relaxed"]} >= {"int4", "int8", "bf16"}
    assert found["tighter"] == []


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(ladders(), policies(), slas(), st.integers(1, 3000), moments())
def test_every_claim_is_what_the_real_decision_does(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, prompt: int, moment: Moment
) -> None:
    ask, predict = Ask("m", prompt, 50, None, sla, moment), Predictor().predict
    decision, found = explained(snapshot, policy, ask)

    def under(policy: Policy, **bounds: float) -> Decision:
        kept = sla.model_dump(exclude_none=True) | bounds
        return decide(replace(ask, sla=Sla(**kept)), policy, snapshot, predict)

    for one in found["levels"]:
        if relaxed := one["relaxed"]:
            event("relaxed")
            bounds = relaxed["bounds"]
            wide = policy
            if relaxed["needs_policy"]:
                outer = dict.fromkeys(Budget.model_fields) | relaxed["budget"]
                wide = policy.model_copy(update=outer)
            mine = {name: bound for name, bound in bounds.items() if getattr(sla, name) is not None}
            assert gets(under(wide, **mine), one["level"])
            for name, bound in bounds.items():  # and no less would do
                had = decision.budget.model_dump()[name]
                less = short_of(name, bound, had)
                if less is None:
                    continue
                assert not gets(
                    under(wide.model_copy(update={name: less}), **(mine | {name: less})),
                    one["level"],
                ), (name, less)
        if cheapest := one["cheapest"]:
            event("cheapest")
            assert gets(under(policy, **cheapest), one["level"])
            for name, bound in cheapest.items():
                less = short_of(name, bound, 1.0 if name in RATIOS else 0.0)
                if less is not None:
                    assert not gets(under(policy, **(cheapest | {name: less})), one["level"]), name
    for one in found["tighter"]:
        event("tighter")
        then = under(policy, **{one["bound"]: one["at"]})
        assert (then.level or then.build) == one["level"] != decision.level
        assert then.action == one["action"]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(snapshot=ladders(), sla=slas(), freed=st.sets(st.sampled_from(sorted(Budget.model_fields))))
def test_a_level_that_a_looser_budget_gets_is_claimed(
    snapshot: LadderSnapshot, sla: Sla, freed: set[str]
) -> None:
    policy, predict = Policy(name="p", build=False), Predictor().predict
    ask = Ask("m", 64, 50, None, sla)
    decision, found = explained(snapshot, policy, ask)
    loose = sla.model_copy(update=dict.fromkeys(freed))
    then = decide(replace(ask, sla=loose), policy, snapshot, predict)
    if then.action == "serve" and not then.misses and then.level != decision.level:
        assert then.level is not None
        event("claimed")
        relaxed = of(found, then.level)["relaxed"]
        assert relaxed is not None
        assert set(relaxed["bounds"]) <= freed
        assert of(found, then.level)["cheapest"] is not None


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(snapshot=ladders(), policy=policies(), sla=slas())
def test_sentences_hold_the_numbers_that_were_tried(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla
) -> None:
    _, found = explained(snapshot, policy, Ask("m", 64, 50, None, sla))
    for one in found["levels"]:
        if one["cheapest"]:
            numbers = map(float, re.findall(r"(?<![\w-])\d[\d.e+-]*(?<!\.)", one["sentences"][-1]))
            assert set(one["cheapest"].values()) <= set(numbers), one["sentences"]
        for sentence in one["sentences"]:
            assert sentence.endswith(".")
            assert one["level"] in sentence
            assert len(sentence) < 320


def test_nobody_is_told_to_ask_for_what_their_key_may_not() -> None:
    ask, policy = asked(tpot_ms=7.0), Policy(name="p", confidence=0.5)
    decision = decide(ask, policy, ladder(), Predictor().predict)
    assert decision.case is not None
    floors = {"tpot_ms": 6.5, "ttft_ms": 60.0}
    found = told(counterfactuals(decision.case, decision, floors), decision, decision.case)
    assert not {"tpot_ms", "ttft_ms"} & {one["bound"] for one in found["tighter"]}
    budgets = [one["cheapest"] for one in found["levels"] if one["cheapest"]]
    assert budgets
    for budget in budgets:
        assert budget["ttft_ms"] >= 60.0
        assert budget["tpot_ms"] >= 6.5


def test_nothing_is_claimed_of_a_level_behind_a_barrier() -> None:
    policy = Policy(name="p", levels=("bf16", "int8"))
    _, found = explained(ladder({"bf16": State.FAILED}), policy, asked(tpot_ms=7.0))
    nothing = {"relaxed": None, "cheapest": None, "sentences": []}
    for level in ("bf16", "fp32", "int4"):
        assert of(found, level) == {"level": level, **nothing}


def test_nothing_is_claimed_of_an_empty_ladder() -> None:
    empty = LadderSnapshot("m", (), 10**9, 0)
    _, found = explained(empty, Policy(name="p"), asked(tpot_ms=1.0))
    assert found == {"levels": [], "tighter": [], "unpinned": None}


@pytest.mark.parametrize("field", ["p50", "none"])
def test_claims_hold_after_learning(field: str) -> None:
    """Upper quantiles move with what is measured; claims move with them."""
    predictor = Predictor()
    policy, ask, snapshot = Policy(name="p"), asked(tpot_ms=7.0), ladder()
    for _ in range(40):
        said = predictor.predict(100, 100, snapshot)[2]
        slower = 1.3 if field == "p50" else 1.0
        predictor.observe("m", "int8", said, ttft_ms=said.ttft_ms, tpot_ms=said.tpot_ms * slower)
    _, found = explained(snapshot, policy, ask, predictor)
    for one in found["levels"]:
        if one["relaxed"]:
            sla = Sla(**one["relaxed"]["budget"])
            again = decide(replace(ask, sla=sla), policy, snapshot, predictor.predict)
            assert gets(again, one["level"])
