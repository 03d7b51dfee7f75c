"""Upper quantiles: how often they are kept, on noise that nobody told them of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.predictor import Predictor
from gateway.policy.quantile import GRID, KINDS, MarginColumns, Margins, Spread, pooled_spread
from tests.policy.ladders import busy, ladder, with_level

Noise = Iterator[float]


def lognormal(rng: np.random.Generator) -> Noise:
    while True:
        yield math.exp(rng.normal(0, 0.3))


def heavy(rng: np.random.Generator) -> Noise:
    """One in ten answers meets something that makes it up to many times slower (Pareto)."""
    while True:
        stray = 1.0 + rng.pareto(1.5) if rng.random() < 0.1 else 1.0
        yield stray * math.exp(rng.normal(0, 0.05))


def drifting(rng: np.random.Generator) -> Noise:
    """The host gets three times as slow, step by step, and its noise twice as wide."""
    for number in range(10**6):
        share = min(1.0, number / 1000)
        yield (1 + 2 * share) * math.exp(rng.normal(0, 0.1 + 0.1 * share))


def bursts(rng: np.random.Generator) -> Noise:
    """Quiet and busy spells that the load does not tell."""
    while True:
        slow = 1.0 if rng.random() < 0.7 else 1.8
        for _ in range(25):
            yield slow * math.exp(rng.normal(0, 0.08))


@pytest.mark.parametrize("noise", [lognormal, heavy, drifting, bursts])
def test_the_promised_share_is_kept_within_three_points(
    noise: Callable[[np.random.Generator], Noise],
) -> None:
    predictor, snapshot = Predictor(), ladder()
    answers, warm = 1600, 100
    kept = dict.fromkeys((0.5, 0.9, 0.95), 0)
    for number, factor in zip(range(answers), noise(np.random.default_rng(7)), strict=False):
        said, tpot = predictor.predict(400, 100, snapshot)[1], 10.0 * factor
        for confidence in kept:
            kept[confidence] += number >= warm and tpot <= said.high(confidence).tpot_ms
        predictor.observe("m", "bf16", said, tpot_ms=tpot)
    shares = {confidence: count / (answers - warm) for confidence, count in kept.items()}
    assert shares[0.95] == pytest.approx(0.95, abs=0.03)
    assert shares[0.9] == pytest.approx(0.9, abs=0.03)
    assert shares[0.5] >= 0.47, "a promise is never below what is expected"


def test_a_level_without_answers_borrows_the_spread_of_the_others() -> None:
    predictor, snapshot = Predictor(), ladder()
    fresh = predictor.predict(400, 100, snapshot)[2]
    for factor, _ in zip(lognormal(np.random.default_rng(3)), range(320), strict=False):
        said = predictor.predict(400, 100, snapshot)[1]
        predictor.observe("m", "bf16", said, tpot_ms=10 * factor**3)
    borrowed = predictor.predict(400, 100, snapshot)[2]
    assert borrowed.margins.factor(1, 0.95) > 1.5 * fresh.margins.factor(1, 0.95)
    assert borrowed.margins.logs[0] == fresh.margins.logs[0], "nothing was measured of it"


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.floats(-50, 50), max_size=80),
    shares=st.tuples(st.floats(0.5, 0.99), st.floats(0.5, 0.99)),
)
def test_a_larger_share_never_gets_a_smaller_bound(
    scores: list[float], shares: tuple[float, float]
) -> None:
    own, pooled = Spread(), pooled_spread()
    for score in scores:
        said = own.margins(pooled).logs[0]
        for spread in (own, pooled):
            spread.scores[0].learn(score, said)
    margins = own.margins(pooled)
    low, high = sorted(shares)
    assert 1.0 <= margins.factor(0, low) <= margins.factor(0, high)
    assert math.isfinite(margins.factor(0, high))


def test_columns_say_what_rows_say() -> None:
    rng = np.random.default_rng(1)
    rows = [
        Margins(tuple(tuple(np.sort(rng.normal(0, 1, len(GRID))).tolist()) for _ in KINDS))
        for _ in range(4)
    ]
    columns = MarginColumns(rows)
    columns.factors(0.93)  # known before the row changes
    columns = columns.replaced(2, rows[0])
    for share in (0.5, 0.6, 0.9, 0.93, 0.99):
        for kind, column in enumerate(columns.factors(share)):
            expected = [row.factor(kind, share) for row in (rows[0], rows[1], rows[0], rows[3])]
            assert column.tolist() == expected


def test_points_of_the_grid_are_read_as_they_are() -> None:
    logs = tuple(0.1 * (index + 1) for index in range(len(GRID)))
    margins = Margins((logs,) * len(KINDS))
    for share, log in zip(GRID, logs, strict=True):
        assert margins.factor(0, share) == pytest.approx(math.exp(log))
    assert margins.factor(0, GRID[2]) < margins.factor(0, 0.92) < margins.factor(0, GRID[3])


def test_high_of_all_levels_is_high_of_each() -> None:
    predictor, snapshot = Predictor(), with_level(ladder(), "int8", stats=busy(3, remaining=90))
    rng = np.random.default_rng(5)
    for factor, _ in zip(heavy(rng), range(80), strict=False):
        said = predictor.under("p")(300, 64, snapshot)
        tokens = int(rng.integers(1, 65))
        predictor.lengths.learn("p", tokens, 64)
        for row, level in ((1, "bf16"), (2, "int8")):
            predictor.observe(
                "m",
                level,
                said[row],
                ttft_ms=90 * factor,
                tpot_ms=9 * factor,
                latency_ms=700 * factor,
                tokens=tokens,
            )
    said = predictor.under("p")(300, 64, snapshot)
    for confidence in (0.5, 0.9, 0.97):
        high = said.high(confidence)
        for row, each in enumerate(said):
            one = each.high(confidence)
            assert (high.ttft_ms[row], high.tpot_ms[row], high.latency_ms[row]) == (
                one.ttft_ms,
                one.tpot_ms,
                one.latency_ms,
            )
            assert one.latency_ms >= each.latency_ms
            assert one.memory_mb == each.memory_mb
