"""Deciding over columns gives, bit for bit, what deciding level by level gives."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.base import EngineStats
from gateway.policy.budget import Sla
from gateway.policy.decide import Ask, decide
from gateway.policy.moment import CALM, Moment
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, LevelFacts, State
from tests.policy import scalar
from tests.policy.ladders import ladder, with_level
from tests.policy.test_decide_properties import NAMES, policies, sizes, slas

counts = st.integers(0, 12)
odd = st.sampled_from([0.0, math.nan, math.inf, -1.0, 1e-9])


@st.composite
def cards(draw: st.DrawFn) -> Card:
    """Measured, guessed and broken ones; round numbers, so that levels tie."""
    rates = st.dictionaries(st.sampled_from(["1", "4", "8"]), st.sampled_from([20.0, 100.0]) | odd)
    return Card(
        measured=draw(st.booleans()),
        resident_bytes=draw(st.integers(0, 5)) * 20_000_000,
        perplexity_ratio=draw(st.sampled_from([1.0, 1.0004, 1.05, 1.3]) | odd),
        kl_nats=draw(st.sampled_from([0.0, 0.01, 0.2]) | odd),
        top1_agreement=draw(st.sampled_from([1.0, 0.9, 0.5]) | odd),
        prefill_tokens_per_s=draw(st.sampled_from([500.0, 3000.0]) | odd),
        decode_tokens_per_s=draw(rates),
        build_seconds=draw(st.sampled_from([0.0, 3.0, 200.0])),
        load_seconds=draw(st.sampled_from([0.0, 0.3, 4.0])),
    )


@st.composite
def levels(draw: st.DrawFn, name: str, card: Card | None = None) -> LevelFacts:
    state = draw(st.sampled_from([State.READY, State.READY, State.STORED, *State]))
    stats = EngineStats()
    if draw(st.booleans()):
        stats = EngineStats(
            running=draw(counts),
            waiting=draw(counts),
            waiting_prompt_tokens=draw(st.sampled_from([0, 1, 700, 10**6])),
            remaining_tokens=draw(st.integers(0, 3000)),
        )
    return LevelFacts(
        name,
        "any",
        state,
        draw(cards()) if card is None else card,
        stats,
        leases=draw(st.integers(0, 2)),
        error="no memory" if state is State.FAILED else None,
        kv_bytes_per_token=draw(st.sampled_from([0, 1000])),
        max_running=draw(st.sampled_from([0, 1, 8])),
        retry_s=12.5 if state is State.FAILED else 0.0,
    )


@st.composite
def ladders(draw: st.DrawFn) -> LadderSnapshot:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=len(NAMES)))
    return _around(draw, tuple(draw(levels(name)) for name in names))


def _around(draw: st.DrawFn, facts: tuple[LevelFacts, ...]) -> LadderSnapshot:
    used = sum(f.card.resident_bytes for f in facts if f.state in (State.READY, State.LOADING))
    split = draw(st.booleans())
    return LadderSnapshot(
        "m",
        facts,
        memory_budget=used + draw(st.integers(0, 60_000_000)),
        memory_used=used + draw(st.sampled_from([0, 10_000_000])),
        host_running=draw(st.sampled_from([0, 3, 40])),
        host_waiting_prompt_tokens=draw(st.sampled_from([0, 500])),
        weight_budget=used + draw(st.integers(0, 60_000_000)) if split else 0,
        weight_used=used if split else 0,
    )


@st.composite
def moments(draw: st.DrawFn) -> list[LadderSnapshot]:
    """A ladder over time: between two requests some levels change, a little or wholly."""
    snapshots = [draw(ladders())]
    for _ in range(draw(st.integers(0, 3))):
        before = snapshots[-1].levels
        after = tuple(draw(st.just(f) | levels(f.level, f.card) | levels(f.level)) for f in before)
        snapshots.append(_around(draw, after))
    return snapshots


met = st.builds(
    Moment,
    waited_ms=st.sampled_from([0.0, 20.0, 900.0]),
    token_ms=st.just(math.inf) | st.floats(5, 100),
    slack_ms=st.just(math.inf) | st.floats(1, 1000),
    expected=st.none() | st.floats(0, 1e4),
    recent=st.none() | st.sampled_from(NAMES),
    settling=st.booleans(),
)
measurements = st.tuples(st.sampled_from(NAMES), st.floats(1, 5000), st.floats(1, 100))


@settings(max_examples=150, deadline=None)
@given(
    snapshots=moments(),
    policy=policies(),
    wishes=st.lists(slas() | st.just(Sla()), min_size=1, max_size=3),
    size=sizes,
    pin=st.none() | st.none() | st.sampled_from(NAMES),
    measured=st.lists(measurements, max_size=4),
    moment=st.just(CALM) | met,
)
def test_columns_decide_as_levels_one_by_one_do(
    *,
    snapshots: list[LadderSnapshot],
    policy: Policy,
    wishes: list[Sla],
    size: tuple[int, int],
    pin: str | None,
    measured: list[tuple[str, float, float]],
    moment: Moment,
) -> None:
    fast, slow = Predictor(), scalar.ScalarPredictor()
    for snapshot in snapshots:
        assert tuple(fast.predict(*size, snapshot)) == slow.each(*size, snapshot)
        for sla in wishes:
            ask = Ask("m", *size, pin, sla, moment)
            decision = decide(ask, policy, snapshot, fast.predict)
            expected = scalar.decide(ask, policy, snapshot, slow)
            assert decision == expected
            assert repr(decision.verdicts) == repr(expected.verdicts)  # repr: NaN equals itself
        if decision.predicted is not None:
            for level, ttft_ms, tpot_ms in measured:
                for predictor in (fast, slow):
                    predictor.observe(
                        "m", level, decision.predicted, ttft_ms=ttft_ms, tpot_ms=tpot_ms
                    )


def test_verdicts_asked_for_later_tell_of_the_moment_of_the_decision() -> None:
    predictor, before = Predictor(), ladder()
    after = with_level(before, "bf16", stats=EngineStats(running=8, remaining_tokens=800))
    ask = Ask("m", 100, 100, None, Sla(tpot_ms=15))
    told = repr(decide(ask, Policy(name="p"), before, Predictor().predict).verdicts)
    kept = decide(ask, Policy(name="p"), before, predictor.predict)
    decide(ask, Policy(name="p"), after, predictor.predict)
    predictor.observe("m", "bf16", predictor.predict(100, 100, after)[1], tpot_ms=99)
    assert repr(kept.verdicts) == told


def test_two_ladders_of_one_name_do_not_mix() -> None:
    """The predictor remembers a ladder's arrays; another ladder of that name gets its own."""
    predictor, whole = Predictor(), ladder()
    part = replace(whole, levels=whole.levels[2:])
    for snapshot in (whole, part, whole, replace(whole, levels=whole.levels[::-1])):
        names = [facts.level for facts in snapshot.levels]
        said = predictor.predict(400, 100, snapshot)
        alone = Predictor().predict(400, 100, snapshot)
        assert tuple(said) == tuple(alone)
        assert [facts.level for facts in said.columns.levels] == names
