"""What holds for every decision, on ladders, loads and budgets nobody thought of."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gateway.engine.base import EngineStats
from gateway.policy.budget import HARD, Budget, Objective, Sla
from gateway.policy.decide import Ask, Decision, Verdict, decide
from gateway.policy.moment import CALM, Moment
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

NAMES = ("fp32", "bf16", "int8", "int4", "sparse24", "lowrank-80", "depth-75")
TIMES = {"ttft_ms": (1, 3000), "tpot_ms": (1, 80), "latency_ms": (10, 20_000)}
FLOORS = {"memory_mb": (1, 120), "max_ppl_ratio": (1, 1.6), "min_agreement": (0, 1)}
RANGES = TIMES | FLOORS


@st.composite
def cards(draw: st.DrawFn) -> Card:
    tpot = draw(st.floats(1, 60))
    growth = draw(st.floats(1, 4))
    return Card(
        measured=draw(st.booleans()),
        resident_bytes=draw(st.integers(0, 100 * 10**6)),
        perplexity_ratio=draw(st.floats(0.99, 1.6)),
        top1_agreement=draw(st.floats(0, 1)),
        prefill_tokens_per_s=draw(st.sampled_from([0.0, 500.0, 3000.0])),
        decode_tokens_per_s={"1": 1000 / tpot, "8": 8000 / (tpot * growth)},
        build_seconds=draw(st.sampled_from([0.0, 3.0, 200.0])),
        load_seconds=draw(st.sampled_from([0.0, 0.3, 4.0])),
    )


@st.composite
def ladders(draw: st.DrawFn) -> LadderSnapshot:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=len(NAMES)))
    usual = [State.READY] * 6 + [State.STORED, State.ABSENT] * 3
    levels = []
    for name in names:
        state = draw(st.sampled_from([*usual, *State]))
        running = draw(st.integers(0, 8)) if state is State.READY else 0
        stats = EngineStats(running, 0, draw(st.integers(0, 2000)), running * 50)
        leases = running + draw(st.integers(0, 1))
        levels.append(LevelFacts(name, "any", state, draw(cards()), stats, leases))
    used = sum(f.card.resident_bytes for f in levels if f.state in (State.READY, State.LOADING))
    budget = used + draw(st.integers(0, 150 * 10**6))
    return LadderSnapshot("m", tuple(levels), budget, used)


@st.composite
def slas(draw: st.DrawFn) -> Sla:
    chosen = draw(st.lists(st.sampled_from(sorted(RANGES)), unique=True, max_size=3))
    bounds = {name: draw(st.floats(*RANGES[name])) for name in chosen}
    return Sla.model_validate(
        {
            **bounds,
            "objective": draw(st.sampled_from(["quality", "latency", "memory", "throughput"])),
            "on_miss": draw(st.sampled_from(["wait", "nearest", "reject"])),
        }
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    return Policy(
        name="p",
        levels=tuple(draw(st.just([]) | st.lists(st.sampled_from(NAMES), unique=True))),
        max_ppl_ratio=draw(st.none() | st.floats(1.1, 1.6)),
        tpot_ms=draw(st.none() | st.floats(20, 80)),
        build=draw(st.booleans()),
        wait_ms=draw(st.sampled_from([100.0, 10_000.0, 300_000.0])),
        expected_requests=draw(st.sampled_from([0, 100, 10**6])),
        confidence=draw(st.sampled_from([0.5, 0.9, 0.99])),
    )


# Properties of the form "if it serves, then …" discard the draws that do not serve.
conditional = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 500))


def run(
    snapshot: LadderSnapshot,
    policy: Policy,
    sla: Sla,
    size: tuple[int, int] = (100, 100),
    pin: str | None = None,
    *,
    moment: Moment = CALM,
) -> Decision:
    return decide(Ask("m", *size, pin, sla, moment), policy, snapshot, Predictor().predict)


def verdict_of(decision: Decision, level: str) -> Verdict:
    return next(verdict for verdict in decision.verdicts if verdict.level == level)


def broken(
    budget: Budget, snapshot: LadderSnapshot, decision: Decision, level: str, confidence: float
) -> set[str]:
    """The bounds a decided level breaks: written again, from the definition."""
    facts = snapshot.level(level)
    assert facts is not None
    assert decision.predicted is not None
    predicted = decision.predicted.high(confidence)
    values = {
        "ttft_ms": predicted.ttft_ms,
        "tpot_ms": predicted.tpot_ms,
        "latency_ms": predicted.latency_ms,
        "memory_mb": predicted.memory_mb,
        "max_ppl_ratio": facts.card.perplexity_ratio,
    }
    found = {
        name
        for name, value in values.items()
        if getattr(budget, name) is not None and value > getattr(budget, name)
    }
    if budget.min_agreement is not None and facts.card.top1_agreement < budget.min_agreement:
        found.add("min_agreement")
    return found


@settings(max_examples=150)
@given(ladders(), policies(), slas(), sizes, st.none() | st.sampled_from(NAMES))
def test_every_input_gets_one_consistent_answer(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, size: tuple[int, int], pin: str | None
) -> None:
    decision = run(snapshot, policy, sla, size, pin)
    assert [verdict.level for verdict in decision.verdicts] == [f.level for f in snapshot.levels]
    assert decision.reason.endswith(".")
    assert len(decision.reason) < 400
    decided = decision.level if decision.action == "serve" else decision.build
    if decision.action == "serve":
        assert decision.level is not None
        assert verdict_of(decision, decision.level).state in (
            State.READY,
            State.LOADING,
            State.STORED,
        )
        if decision.build is not None:
            assert verdict_of(decision, decision.build).state is State.ABSENT
    elif decision.action == "wait":
        assert decision.level is None
        assert decision.build is not None
        assert verdict_of(decision, decision.build).state in (State.ABSENT, State.BUILDING)
    else:
        assert decision.level is None
        assert decision.predicted is None
        assert decision.code not in ("fits", "nearest", "cold", "waits", "pinned")
    if decision.action != "reject":
        assert decided is not None
        assert set(decision.misses) == broken(
            decision.budget, snapshot, decision, decided, policy.confidence
        )
        assert decision.retry_after_s is None
        assert decision.could_meet is None
        assert pin is None or decided == pin
    if decision.build is not None:
        assert policy.build or snapshot.level(decision.build).state is State.BUILDING  # type: ignore[union-attr]


moments = st.builds(
    Moment,
    waited_ms=st.sampled_from([0.0, 50.0, 2000.0]),
    token_ms=st.just(math.inf) | st.floats(2, 100),
    slack_ms=st.just(math.inf) | st.floats(1, 2000),
    expected=st.none() | st.floats(0, 1e5),
    recent=st.none() | st.sampled_from(NAMES),
    settling=st.booleans(),
)


@conditional
@given(ladders(), policies(), slas(), sizes, moments)
def test_hard_bounds_are_never_traded(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, size: tuple[int, int], moment: Moment
) -> None:
    decision = run(snapshot, policy, sla, size, moment=moment)
    assume(decision.action != "reject")
    level = decision.level if decision.action == "serve" else decision.build
    assert level is not None
    assert not HARD & set(decision.misses)
    assert not policy.levels or level in policy.levels
    facts = snapshot.level(level)
    assert facts is not None
    if facts.state not in (State.READY, State.LOADING):
        idle = sum(
            f.card.resident_bytes
            for f in snapshot.levels
            if f.state is State.READY and f.leases == 0
        )
        in_use = snapshot.memory_used - idle
        assert in_use + facts.card.resident_bytes <= snapshot.memory_budget


@conditional
@given(ladders(), policies(), slas(), moments, st.none() | st.sampled_from(NAMES))
def test_no_choice_breaks_the_promise_of_one_that_runs(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, moment: Moment, pin: str | None
) -> None:
    size = (100, 100)
    decision = run(snapshot, policy, sla, size, pin, moment=moment)
    assume(decision.action == "serve")
    assert decision.level is not None
    assert decision.predicted is not None
    assert decision.predicted.high(policy.confidence).tpot_ms <= moment.token_ms
    facts = snapshot.level(decision.level)
    assert facts is not None
    rate = facts.card.prefill_tokens_per_s
    assert not rate or 1000.0 / rate * size[0] <= moment.slack_ms * (1 + 1e-9)


@conditional
@given(ladders(), policies(), slas(), moments)
def test_staying_keeps_what_is_promised(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, moment: Moment
) -> None:
    """A steady choice is one that fits, and only there is it another than without a past."""
    decision = run(snapshot, policy, sla, moment=moment)
    without = replace(moment, recent=None, settling=False)
    anew = run(snapshot, policy, sla, moment=without)
    if decision.code == "steady":
        assert decision.misses == ()
        assert anew.code == "fits"
        assert anew.level != decision.level
    elif decision.code != "fits":  # (a level not loaded at another's cost is no other decision)
        assert replace(decision, warm=None, build=None, reason="") == replace(
            anew, warm=None, build=None, reason=""
        )


@settings(max_examples=100)
@given(ladders(), policies(), slas(), sizes)
def test_deciding_is_deterministic_and_leaves_no_trace(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, size: tuple[int, int]
) -> None:
    predictor = Predictor()
    ask = Ask("m", *size, None, sla)
    first = decide(ask, policy, snapshot, predictor.predict)
    assert decide(ask, policy, snapshot, predictor.predict) == first
    assert run(snapshot, policy, sla, size) == first


def cost(snapshot: LadderSnapshot, verdict: Verdict, objective: Objective) -> float:
    facts, predicted = snapshot.level(verdict.level), verdict.predicted
    assert facts is not None
    assert predicted is not None
    if objective == "quality":
        return round(max(1.0, facts.card.perplexity_ratio), 3)
    if objective == "latency":
        return predicted.latency_ms
    if objective == "memory":
        return predicted.memory_mb
    return 1000 / max(facts.card.decode_tokens_per_s.values())


@conditional
@given(ladders(), policies(), slas(), sizes)
def test_what_is_served_as_fitting_is_the_best_that_fits(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, size: tuple[int, int]
) -> None:
    decision = run(snapshot, policy, sla, size)
    assume(decision.code == "fits")
    assert decision.level is not None
    assert decision.misses == ()
    objective = sla.objective or "quality"
    mine = cost(snapshot, verdict_of(decision, decision.level), objective)
    for verdict in decision.verdicts:
        usable = verdict.state in (State.READY, State.LOADING, State.STORED)
        if verdict.ok and usable:
            assert mine <= cost(snapshot, verdict, objective)


@conditional
@given(ladders(), policies(), slas(), st.data())
def test_a_looser_budget_never_gets_a_worse_level(
    snapshot: LadderSnapshot, policy: Policy, sla: Sla, data: st.DataObject
) -> None:
    """Without a past: another budget is another kind of request, and has a past of its own."""
    moment = replace(data.draw(moments, label="moment"), recent=None, settling=False)
    tight = run(snapshot, policy, sla, moment=moment)
    assume(tight.action != "reject" and not tight.misses)
    looser: dict[str, float | None] = {}
    for name, bound in sla.bounds():
        low, high = RANGES[name]
        bounds = (low, bound) if name == "min_agreement" else (bound, high * 2)
        looser[name] = data.draw(st.none() | st.floats(*bounds), label=name)
    loose = run(snapshot, policy, sla.model_copy(update=looser), moment=moment)
    assert loose.action != "reject"
    assert loose.misses == ()
    had, got = tight.level or tight.build, loose.level or loose.build
    assert had is not None
    assert got is not None
    objective = sla.objective or "quality"
    before = cost(snapshot, verdict_of(loose, had), objective)
    assert cost(snapshot, verdict_of(loose, got), objective) <= before


@conditional
@given(ladders(), slas(), sizes)
def test_what_could_be_met_is_met_when_asked_for(
    snapshot: LadderSnapshot, sla: Sla, size: tuple[int, int]
) -> None:
    policy = Policy(name="p")
    refused = run(snapshot, policy, sla.model_copy(update={"on_miss": "reject"}), size)
    assume(refused.could_meet is not None)
    offer = Sla.model_validate(
        {**(refused.could_meet or {}), "objective": sla.objective, "on_miss": "reject"}
    )
    again = run(snapshot, policy, offer, size)
    assert (again.action, again.misses) == ("serve", ())


@settings(max_examples=100)
@given(ladders(), policies(), slas())
def test_an_idle_host_is_never_too_busy(snapshot: LadderSnapshot, policy: Policy, sla: Sla) -> None:
    """A refusal blames the load only when there is some (a level being unloaded counts)."""
    levels = tuple(
        replace(
            facts,
            stats=EngineStats(),
            leases=0,
            state=State.STORED if facts.state is State.DRAINING else facts.state,
        )
        for facts in snapshot.levels
    )
    assert run(replace(snapshot, levels=levels), policy, sla).code != "busy"
