"""What decisions remember: kinds of requests, traffic, loads."""

from __future__ import annotations

import pytest

from gateway.policy.recent import HORIZON_S, SETTLE_S, STAY_S, Recent


def test_a_kind_of_request_is_remembered_for_a_moment() -> None:
    recent = Recent()
    recent.chose("kind", "int8", 100.0)
    assert recent.level("kind", 100.0 + STAY_S) == "int8"
    assert recent.level("kind", 101.0 + STAY_S) is None
    assert recent.level("other", 100.0) is None


def test_kinds_and_policies_are_bounded() -> None:
    recent = Recent()
    for number in range(3000):
        recent.chose(number, "int8", 100.0)
        recent.came(f"p{number}", 100.0)
    assert recent.level(0, 100.0) is None
    assert recent.level(2999, 100.0) == "int8"
    assert len(recent._levels) == len(recent._traffic) == 1024


class TestTraffic:
    def learned(self, every_s: float, seconds: float, stated: float = 100) -> float:
        recent, now = Recent(), 0.0
        while now < seconds:
            recent.came("p", now)
            now += every_s
        return recent.expected("p", stated, seconds)

    def test_at_first_as_the_policy_says(self) -> None:
        assert Recent().expected("p", 100, 0.0) == 100
        assert self.learned(1.0, 1.0) == pytest.approx(100, rel=0.1)

    def test_then_as_many_as_come(self) -> None:
        assert self.learned(0.1, 1200) == pytest.approx(10 * HORIZON_S, rel=0.15)
        assert self.learned(10, 1200) == pytest.approx(HORIZON_S / 10, rel=0.15)

    def test_nobody_comes(self) -> None:
        recent = Recent()
        recent.came("p", 0.0)
        assert recent.expected("p", 100, 3000.0) < 20

    def test_a_policy_that_wants_none_counted(self) -> None:
        assert self.learned(0.1, 600, stated=0) == 0


def test_a_load_settles() -> None:
    recent = Recent()
    assert not recent.settling(0.0)
    recent.loads(10.0)
    assert recent.settling(10.0 + SETTLE_S)
    assert not recent.settling(10.1 + SETTLE_S)
