"""Live promises: what they bear, and for how long."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.promises import ANYTHING, Promise, Promises, bears

NOW = 500.0


def promise(done: int = 0, first_ago_s: float | None = None, **changes: Any) -> Promise:
    """Of 101 tokens, 10 ms each as predicted; `done` tokens came in the last `first_ago_s`."""
    first = None if first_ago_s is None else NOW - first_ago_s
    values: dict[str, Any] = {
        "level": "int8",
        "arrived": NOW - 1.0,
        "tokens": 101,
        "pace_ms": 10.0,
        "tpot_ms": None,
        "latency_ms": None,
        "progress": lambda: (done, first),
    }
    return Promise(**(values | changes))


@pytest.mark.parametrize(
    ("made", "token_ms", "slack_ms"),
    [
        pytest.param(promise(tpot_ms=20), 20, 1010, id="pace, nothing generated yet"),
        pytest.param(promise(51, 0.5, tpot_ms=20), 20, 500, id="pace, ahead: no credit"),
        pytest.param(promise(51, 1.1, tpot_ms=20), 18, 0, id="pace, behind: to be made good"),
        pytest.param(promise(51, 2.0, tpot_ms=20), math.inf, math.inf, id="pace, lost"),
        pytest.param(promise(51, 0.5, latency_ms=3000), 40, 1500, id="latency: 2 s for 50 tokens"),
        pytest.param(promise(51, 0.5, latency_ms=900), math.inf, math.inf, id="latency, over"),
        pytest.param(promise(51, 0.5, latency_ms=1300), math.inf, math.inf, id="latency, lost"),
        pytest.param(
            promise(51, 0.5, latency_ms=3000, tpot_ms=15), 15, 250, id="the tighter of both"
        ),
        pytest.param(promise(101, 1.0, tpot_ms=20), math.inf, math.inf, id="done"),
        pytest.param(promise(51, 0.5), math.inf, math.inf, id="nothing promised"),
    ],
)
def test_what_a_promise_bears(made: Promise, token_ms: float, slack_ms: float) -> None:
    found = bears(made, NOW)
    assert found.token_ms == pytest.approx(token_ms, rel=0.01)
    assert found.slack_ms == pytest.approx(slack_ms, abs=1.0)


@given(st.integers(0, 100), st.floats(0.0, 3.0), st.booleans(), st.floats(0.0, 1.0))
def test_what_it_bears_keeps_it(done: int, ago_s: float, by_pace: bool, share: float) -> None:
    """Tokens as slow as it bears, or a halt as long and then tokens as before: it is kept."""
    tpot_ms, latency_ms = 1 + 99 * share, 1 + 4999 * share
    bound: dict[str, Any] = {"tpot_ms": tpot_ms} if by_pace else {"latency_ms": latency_ms}
    found = bears(promise(done, ago_s if done else None, **bound), NOW)
    if found == ANYTHING:
        return
    left = 101 - done
    pace = 1000 * ago_s / (done - 1) if done > 1 else 10.0
    for more_ms in (
        left * found.token_ms,
        found.slack_ms + left * min(pace, found.token_ms),
    ):
        if by_pace:
            begun, gaps = (1000.0 * ago_s, done - 1) if done else (0.0, 0)
            behind = max(0.0, begun - tpot_ms * gaps)
            assert more_ms + behind <= tpot_ms * left + 1e-3
        else:
            assert 1000.0 + more_ms <= latency_ms + 1e-3


def test_the_tightest_of_all_levels_counts() -> None:
    house = Promises()
    fast, slow = promise(tpot_ms=15, level="int4"), promise(tpot_ms=30)
    assert house.bearable(NOW) is ANYTHING
    house.begin(slow)
    assert house.bearable(NOW).token_ms == 30
    house.begin(fast)
    assert house.bearable(NOW).token_ms == 15
    assert {level: found.token_ms for level, found in house.by_level(NOW).items()} == {
        "int4": 15,
        "int8": 30,
    }
    house.end(fast)
    assert house.bearable(NOW + 1).token_ms == 30
    house.end(slow)
    house.end(slow)
    assert (len(house), house.bearable(NOW + 1)) == (0, ANYTHING)
