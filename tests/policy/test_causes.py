"""Causes of waiting and the weights learned for them: load only adds, and the truth is found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.base import EngineStats
from gateway.policy.causes import TPOT_MOST, TPOT_PRIOR, Arrivals, Busy
from gateway.policy.predictor import Predictor
from gateway.policy.regression import Regression
from gateway.variants.variant import LadderSnapshot
from tests.policy.ladders import CARDS, ladder, with_level
from tests.policy.scalar_predict import ScalarPredictor

NAMES = tuple(CARDS)


@st.composite
def loads(draw: st.DrawFn) -> LadderSnapshot:
    snapshot = ladder(building=draw(st.integers(0, 2)))
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        count = draw(st.integers(1, 40))
        slots = draw(st.sampled_from([0, 4, 16]))
        stats = EngineStats(
            running=min(count, slots or 16),
            waiting=max(0, count - (slots or 16)),
            waiting_prompt_tokens=draw(st.integers(0, 5000)),
            remaining_tokens=draw(st.integers(1, 20_000)),
        )
        leases = count + draw(st.integers(0, 3))
        snapshot = with_level(snapshot, name, stats=stats, leases=leases, max_running=slots)
    return busier(snapshot, None)


def busier(snapshot: LadderSnapshot, name: str | None, tokens: int = 0) -> LadderSnapshot:
    """One sequence more at a level, with so many tokens to prefill and as many to generate."""
    facts = snapshot.level(name) if name is not None else None
    if facts is not None:
        stats, slots = facts.stats, facts.max_running or 16
        full = stats.running >= slots
        more = replace(
            stats,
            running=stats.running + (not full),
            waiting=stats.waiting + full,
            waiting_prompt_tokens=stats.waiting_prompt_tokens + tokens,
            remaining_tokens=stats.remaining_tokens + max(1, tokens),
        )
        snapshot = with_level(snapshot, facts.level, stats=more, leases=facts.leases + 1)
    return replace(
        snapshot,
        host_running=sum(f.stats.running for f in snapshot.levels),
        host_waiting_prompt_tokens=sum(f.stats.waiting_prompt_tokens for f in snapshot.levels),
    )


@st.composite
def experience(draw: st.DrawFn) -> tuple[Predictor, ScalarPredictor]:
    """A predictor that learned from some answers, and its oracle that learned the same."""
    both = (Predictor(), ScalarPredictor())
    answers = draw(st.lists(st.tuples(loads(), st.sampled_from(NAMES), ms, ms), max_size=5))
    for number, (snapshot, name, ttft, tpot) in enumerate(answers):
        said = both[0].under("p", 0.1 * number)(200, 50, snapshot)[NAMES.index(name)]
        for predictor in both:
            predictor.predict(1, 1, snapshot)
            predictor.arrived(0.1 * number)
            predictor.observe(
                "m", name, said, ttft_ms=ttft, tpot_ms=tpot, latency_ms=50 * tpot, tokens=50
            )
    return both


ms = st.floats(1, 1000)
sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


@settings(max_examples=60, deadline=None)
@given(load=loads(), size=sizes, known=experience(), name=st.sampled_from(NAMES))
def test_more_load_never_predicts_less(
    load: LadderSnapshot,
    size: tuple[int, int],
    known: tuple[Predictor, ScalarPredictor],
    name: str,
) -> None:
    predictor, _ = known
    facts = load.level(name)
    assert facts is not None
    stay = facts.stats.remaining_tokens // max(1, facts.stats.running + facts.stats.waiting)
    now = predictor.under("p", 0.5)(*size, load)
    then = predictor.under("p", 0.5)(*size, busier(load, name, tokens=stay))
    # Causes have learned weights of their own: time that moves from one cause to another (a prompt
    # from waiting for nobody to queueing) may weigh a little less there.
    for before, after in zip(now, then, strict=True):
        assert after.ttft_ms >= before.ttft_ms * (1 - 0.01)
        assert after.tpot_ms >= before.tpot_ms * (1 - 1e-9)
        assert math.isfinite(after.latency_ms)


@settings(max_examples=60, deadline=None)
@given(load=loads(), size=sizes, known=experience(), others=st.integers(0, 9))
def test_columns_say_what_levels_one_by_one_do(
    load: LadderSnapshot,
    size: tuple[int, int],
    known: tuple[Predictor, ScalarPredictor],
    others: int,
) -> None:
    predictor, oracle = known
    load = replace(load, host_running=load.host_running + others)
    assert tuple(predictor.predict(*size, load)) == oracle.each(*size, load)
    per_ms = predictor._rate_at(0.5)
    assert tuple(predictor.under("p", 0.5)(*size, load)) == oracle.each(*size, load, per_ms)


def test_what_arrived_lately_lengthens_answers_and_is_forgotten() -> None:
    predictor = Predictor()
    said = predictor.predict(100, 200, ladder())[1]
    predictor.observe("m", "bf16", said, ttft_ms=said.ttft_ms, tpot_ms=said.tpot_ms, tokens=200)
    for number in range(40):
        predictor.arrived(0.05 * number)
    calm, busy, later = (
        predictor.under("p", now)(100, 200, ladder())[1].tpot_ms for now in (None, 2.0, 60.0)
    )
    assert busy > 1.2 * calm
    assert later == pytest.approx(calm, rel=1e-3)


def test_arrivals_never_take_more_than_the_cores() -> None:
    assert Arrivals().pressure(100, 1.0) == 0.0
    crowd = Arrivals(per_ms=10.0, tokens=100.0, prefill_ms=20.0)
    assert Arrivals(0.001, 100.0, 20.0).pressure(100, 0.3) < crowd.pressure(100, 0.3) < 10


@pytest.mark.parametrize(("left", "expected"), [(25, 0.25), (100, 0.75), (math.inf, 1.0)])
def test_how_long_a_running_sequence_stays_beside_an_answer(left: float, expected: float) -> None:
    """Against tokens left drawn evenly between none and twice their mean."""
    busy = Busy(1, 1, left, 0, 16, 0.0, 0, math.inf, 10.0, 10.0, tuple(range(-1, 17)))
    assert busy.beside(100.0).company == pytest.approx(expected)
    if math.isfinite(left):
        drawn = np.random.default_rng(0).uniform(0, 2 * left, 100_000)
        assert np.minimum(1.0, drawn / 100).mean() == pytest.approx(expected, abs=0.01)


def samples(
    seed: int, weights: tuple[float, ...], noise: float
) -> Iterator[tuple[list[float], float]]:
    rng = np.random.default_rng(seed)
    while True:
        causes = rng.exponential(5.0, len(weights)) * (rng.random(len(weights)) < 0.6)
        causes[0], causes[4] = 10.0, 1.0
        truth = float(np.dot(weights, causes)) * math.exp(rng.normal(0, noise))
        yield causes.tolist(), truth


def test_weights_are_found_and_followed() -> None:
    regression = Regression(TPOT_PRIOR, TPOT_MOST, 0.05)
    for weights in ((0.5, 1.5, 1.0, 0.3, 2.0, 0.2, 0.0, 0.1), (2.0, 0.5, 1.0, 0.0, 1.0, 1, 0.5, 1)):
        for (causes, truth), _ in zip(samples(1, weights, 0.1), range(1500), strict=False):
            regression.learn(causes, truth)
        errors = [
            abs(regression.of(causes) / truth - 1)
            for (causes, truth), _ in zip(samples(2, weights, 0.0), range(300), strict=False)
        ]
        assert np.mean(errors) < 0.05


def test_one_answer_in_ten_that_met_something_else_moves_little() -> None:
    weights = (0.5, 1.5, 1.0, 0.3, 2.0, 0.2, 0.0, 0.1)
    regression, rng = Regression(TPOT_PRIOR, TPOT_MOST, 0.05), np.random.default_rng(4)
    for (causes, truth), _ in zip(samples(3, weights, 0.05), range(1500), strict=False):
        regression.learn(causes, truth * (10.0 if rng.random() < 0.1 else 1.0))
    errors = [
        regression.of(causes) / truth - 1
        for (causes, truth), _ in zip(samples(2, weights, 0.0), range(300), strict=False)
    ]
    assert np.mean(np.abs(errors)) < 0.1


def test_before_anything_is_learned_the_card_counts() -> None:
    assert Regression(TPOT_PRIOR, TPOT_MOST, 0.05).of([10, 5, 2, 3, 1, 0, 0, 0]) == 17
