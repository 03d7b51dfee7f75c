"""The arithmetic of candidates: who gets one, and when its attainment has fallen for sure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.canary import (
    ALPHA,
    Counts,
    Plan,
    Split,
    Tally,
    drop_between,
    log_evidence,
    share,
    state_of,
)
from gateway.policy.policy import Policy

STABLE, CANARY = Policy(name="p", ttft_ms=300), Policy(name="p", ttft_ms=200)
PLAN = Plan(percent=10, min_requests=50, max_drop=0.05)


def split(salt: str = "p 1", **plan: object) -> Split:
    return Split(STABLE, CANARY, Plan.model_validate(plan), salt)


def counts(stable: tuple[int, int], canary: tuple[int, int]) -> Counts:
    """(met, requests) of each arm."""
    return Counts(Tally(stable[1], stable[0]), Tally(canary[1], canary[0]))


class TestSplit:
    @pytest.mark.parametrize("percent", [1, 10, 50])
    def test_as_many_as_asked_for_get_it(self, percent: float) -> None:
        one, n = split(percent=percent), 20_000
        got = sum(one.choose("key", f"user-{i}", "") is CANARY for i in range(n))
        slack = 5 * math.sqrt(n * percent / 100 * (1 - percent / 100))
        assert abs(got - n * percent / 100) < slack

    @given(st.text(), st.text(), st.floats(0.1, 99), st.floats(0.1, 99))
    def test_a_larger_share_keeps_everybody(
        self, key: str, user: str, one: float, other: float
    ) -> None:
        small, large = sorted((one, other))
        if split(percent=small).choose(key, user, "") is CANARY:
            assert split(percent=large).choose(key, user, "") is CANARY

    @given(st.none() | st.text(), st.none() | st.text(), st.text(), st.text())
    def test_whoever_is_known_keeps_an_arm(
        self, key: str | None, user: str | None, seed: str, other: str
    ) -> None:
        one = split(percent=50)
        if key is not None or user is not None:
            assert one.choose(key, user, seed) is one.choose(key, user, other)
        assert one.choose(key, user, seed) is one.choose(key, user, seed)

    def test_requests_are_drawn_one_by_one_when_not_sticky(self) -> None:
        one = split(percent=50, sticky=False)
        arms = [one.choose("key", "user", str(i)) for i in range(64)]
        assert {id(arm) for arm in arms} == {id(STABLE), id(CANARY)}

    def test_another_rollout_tries_others(self) -> None:
        first, second = split("p 1", percent=10), split("p 2", percent=10)
        users = [f"user-{i}" for i in range(5000)]
        both = sum(
            first.choose(None, u, "") is CANARY and second.choose(None, u, "") is CANARY
            for u in users
        )
        assert 20 < both < 90  # 1 % by chance

    def test_places_lie_between_0_and_1(self) -> None:
        places = [share("s", str(i)) for i in range(1000)]
        assert 0 <= min(places) < 0.02
        assert 0.98 < max(places) < 1


def reference(found: Counts, drop: float) -> float:
    """The evidence that the drop is larger than `drop`: the least of a fine grid of rates."""

    def log_m(tally: Tally, rates: np.ndarray) -> np.ndarray:
        met, missed = tally.met, tally.requests - tally.met
        mixed = math.lgamma(0.5 + met) + math.lgamma(0.5 + missed) - math.lgamma(1 + tally.requests)
        with np.errstate(divide="ignore", invalid="ignore"):
            hits = np.where(met > 0, met * np.log(rates), 0.0)
            misses = np.where(missed > 0, missed * np.log1p(-rates), 0.0)
        return np.asarray(mixed - math.log(math.pi) - hits - misses)

    rates = np.linspace(max(0.0, -drop), min(1.0, 1.0 - drop), 200_001)
    others = np.clip(rates + drop, 0.0, 1.0)
    return float(np.min(log_m(found.canary, rates) + log_m(found.stable, others)))


class TestEvidence:
    @settings(max_examples=60)
    @given(st.integers(1, 300), st.integers(1, 300), st.data(), st.floats(-0.3, 0.3))
    def test_it_is_the_least_over_all_rates_that_far_apart(
        self, n: int, m: int, data: st.DataObject, drop: float
    ) -> None:
        found = counts((data.draw(st.integers(0, n)), n), (data.draw(st.integers(0, m)), m))
        seen = found.stable.met / n - found.canary.met / m
        got = log_evidence(found, drop, "above")
        if seen <= drop:
            assert got == 0.0
        else:
            assert got == pytest.approx(reference(found, drop), abs=1e-3)

    @pytest.mark.parametrize(
        ("stable", "canary", "state"),
        [
            pytest.param((0, 0), (0, 0), "collecting", id="nothing"),
            pytest.param((950, 1000), (0, 49), "collecting", id="too few"),
            pytest.param((950, 1000), (0, 50), "falls", id="a collapse"),
            pytest.param((950, 1000), (30, 50), "falls", id="95 to 60 percent"),
            pytest.param((950, 1000), (46, 50), "collecting", id="95 to 92 percent"),
            pytest.param((950, 1000), (900, 1000), "collecting", id="as much less as is allowed"),
            pytest.param((950, 1000), (960, 1000), "holds", id="no less"),
            pytest.param((0, 0), (0, 500), "collecting", id="nothing to compare with"),
            pytest.param((10, 1000), (10, 1000), "holds", id="both are bad"),
            pytest.param((500, 500), (500, 500), "holds", id="both are perfect"),
        ],
    )
    def test_states(self, stable: tuple[int, int], canary: tuple[int, int], state: str) -> None:
        assert state_of(PLAN, counts(stable, canary)) == state

    def test_more_misses_never_look_better(self) -> None:
        for met, missed in itertools.product(range(0, 60, 7), range(0, 60, 7)):
            found = counts((90, 100), (met, met + missed))
            worse = counts((90, 100), (met, met + missed + 1))
            before, after = (log_evidence(c, 0.05, "above") for c in (found, worse))
            assert max(0.0, after) >= max(0.0, before) - 1e-9

    def test_bounds_on_the_drop_hold_it_and_close_in(self) -> None:
        assert drop_between(Counts()) == (-1.0, 1.0)
        widths = []
        for n in (20, 200, 2000):
            low, high = drop_between(counts((9 * n // 10, n), (7 * n // 10, n)))
            assert -1 <= low < 0.2 < high <= 1
            widths.append(high - low)
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] < 0.12


def _ends(rates: np.ndarray, drop: float, seed: int) -> int | None:
    """After how many requests a trial is ended, asked after every one; None: never."""
    rng = np.random.default_rng(seed)
    found = Counts()
    for number, rate in enumerate(rates):
        arm = "canary" if rng.random() < 0.5 else "stable"
        met = bool(rng.random() < rate - (drop if arm == "canary" else 0.0))
        found = found.counting(arm, met=met)
        if arm == "canary" and state_of(PLAN, found) == "falls":
            return number
    return None


@pytest.mark.parametrize("traffic", ["steady", "bursty"])
def test_a_candidate_that_is_no_worse_is_rarely_ended(traffic: str) -> None:
    """Peeking after every request, as the gateway does; α is allowed, and 60 trials are run."""
    base = np.full(400, 0.9)
    if traffic == "bursty":
        base[np.arange(400) % 100 < 30] = 0.3
    allowed = PLAN.max_drop  # exactly as much worse as it may be: the hardest case
    ended = sum(_ends(base, allowed, seed) is not None for seed in range(60))
    assert ended <= 60 * ALPHA + 3 * math.sqrt(60 * ALPHA * (1 - ALPHA))


def test_a_worse_candidate_is_ended_soon() -> None:
    ends = [_ends(np.full(1500, 0.95), 0.3, seed) for seed in range(20)]
    assert None not in ends
    assert sorted(end or 0 for end in ends)[10] < 250
