"""Budgets: combining them, and which bounds a cost breaks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.budget import Budget, Costs, excess
from gateway.policy.objective import gain
from tests.policy.ladders import CARDS, choose, ladder, with_level

budgets = st.builds(
    Budget,
    ttft_ms=st.none() | st.floats(1, 1e4),
    memory_mb=st.none() | st.floats(1, 1e4),
    max_ppl_ratio=st.none() | st.floats(1, 3),
    min_agreement=st.none() | st.floats(0, 1),
)
costs = st.builds(
    Costs,
    ttft_ms=st.none() | st.floats(0, 1e4),
    memory_mb=st.floats(0, 1e4),
    max_ppl_ratio=st.floats(1, 3),
    min_agreement=st.floats(0, 1),
)


@given(budgets, budgets, costs)
def test_an_intersection_breaks_where_either_does(one: Budget, two: Budget, cost: Costs) -> None:
    both = one.intersect(two)
    assert both == two.intersect(one)
    broken = excess(both.bounds(), cost).keys()
    assert broken == excess(one.bounds(), cost).keys() | excess(two.bounds(), cost).keys()


@pytest.mark.parametrize(
    ("budget", "cost", "expected"),
    [
        pytest.param({"ttft_ms": 100}, {"ttft_ms": 100.0}, {}, id="the bound itself is kept"),
        pytest.param({"ttft_ms": 100}, {"ttft_ms": 150.0}, {"ttft_ms": 0.5}, id="above"),
        pytest.param({"ttft_ms": 100}, {"ttft_ms": None}, {}, id="not measured"),
        pytest.param({"ttft_ms": 100}, {"ttft_ms": math.nan}, {"ttft_ms": math.inf}, id="NaN"),
        pytest.param({"min_agreement": 0.8}, {"min_agreement": 0.9}, {}, id="more agreement"),
        pytest.param(
            {"min_agreement": 0.8}, {"min_agreement": 0.6}, {"min_agreement": 0.25}, id="less"
        ),
        pytest.param({"min_agreement": 0}, {"min_agreement": 0.0}, {}, id="no floor"),
    ],
)
def test_excess(budget: dict[str, float], cost: dict[str, float], expected: object) -> None:
    assert excess(Budget(**budget).bounds(), Costs(**cost)) == pytest.approx(expected)


def test_a_level_of_unknown_quality_keeps_no_quality_bound() -> None:
    broken = CARDS["int8"].model_copy(update={"perplexity_ratio": math.nan})
    snapshot = with_level(ladder(), "int8", card=broken)
    assert choose(snapshot, tpot_ms=7, max_ppl_ratio=1.1).level == "int4"
    assert choose(snapshot, tpot_ms=7).level == "int4"


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        pytest.param((12.2, 1.0), (34.2, 1.0), 34.2 / 12.2 - 1, id="relative to the better"),
        pytest.param((34.2, 1.0), (12.2, 1.0), 0.0, id="it is worse"),
        pytest.param((1.0, 10.0), (1.0, 30.0), 2.0, id="the first cost that differs"),
        pytest.param((1.0, 10.0), (1.0, 10.0), 0.0, id="equal"),
        pytest.param((0.0,), (3.0,), 100.0, id="nothing against something"),
        pytest.param((1.0,), (math.inf,), 100.0, id="bounded"),
    ],
)
def test_gain(better: tuple[float, ...], worse: tuple[float, ...], expected: float) -> None:
    assert gain(better, worse) == pytest.approx(expected)
