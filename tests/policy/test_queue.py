"""The queue before the slots: order, fairness, bounds, what can still be kept; and a whole host
simulated in front of it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.queue import AGE_S, PATIENCE_S, QUANTUM_S, SHARE, Queue, QueueFull, Waiting
from tests.policy.queue_sim import KEYS, simulate

NOW = 1000.0


def entry(**changes: Any) -> Waiting:
    values: dict[str, Any] = {"key": "a", "level": "int8", "priority": 5, "arrived": NOW}
    return Waiting(**(values | changes))


def queue(*entries: Waiting, most: int = 100, most_per_key: int = 100) -> Queue:
    made = Queue(most, most_per_key)
    for one in entries:
        made.push(one, one.arrived)
    return made


def drained(made: Queue, now: float = NOW, level: str = "int8") -> list[Waiting]:
    """Everybody, in the order in which they start at one moment."""
    order = []
    while (head := made.head(level, now)) is not None:
        made.start(head, now)
        order.append(head)
    return order


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"start_by": NOW + 1}, {"start_by": NOW + 2}, id="least slack"),
        pytest.param({"start_by": NOW + 9}, {}, id="a deadline before none"),
        pytest.param(
            {"priority": 6, "start_by": NOW + 9}, {"start_by": NOW + 1}, id="priority before slack"
        ),
        pytest.param({"start_by": NOW + 9}, {"priority": 9}, id="a deadline before priority"),
        pytest.param({"priority": 9}, {"priority": 0}, id="priority without deadlines"),
        pytest.param({"arrived": NOW - 1}, {}, id="the oldest of equals"),
        pytest.param(
            {"priority": 3, "arrived": NOW - 3 * AGE_S}, {}, id="who waits rises above the next"
        ),
    ],
)
def test_who_goes_first(first: dict[str, Any], second: dict[str, Any]) -> None:
    for given_first in (True, False):
        one, other = entry(**first), entry(**second)
        made = queue(*((one, other) if given_first else (other, one)))
        for moment in (NOW - 2 * AGE_S, NOW - AGE_S):
            made.head("int8", moment)
        assert drained(made)[0] is one


def test_levels_have_lanes_of_their_own() -> None:
    one, other = entry(level="int8"), entry(level="bf16")
    made = queue(one, other)
    assert made.levels() == ["int8", "bf16"]
    assert made.head("bf16", NOW) is other
    assert made.head("int4", NOW) is None


def test_keys_take_turns_by_the_time_they_hold_slots() -> None:
    greedy = [entry(key="greedy", start_by=NOW + 50, hold_s=1.0) for _ in range(20)]
    modest = [entry(key="modest", start_by=NOW + 60, hold_s=4.0) for _ in range(5)]
    order = drained(queue(*greedy, *modest))
    held: Counter[str] = Counter()
    for one in order[:16]:  # while both have somebody waiting
        held[one.key] += int(one.hold_s)
        assert abs(held["greedy"] - held["modest"]) <= QUANTUM_S + 4.0
    assert held["modest"] >= 6


def test_a_key_that_was_away_has_no_credit() -> None:
    made = queue(*(entry(key="a", start_by=NOW + 50) for _ in range(30)))
    for _ in range(20):
        head = made.head("int8", NOW)
        assert head is not None
        made.start(head, NOW)
    for _ in range(10):
        made.push(entry(key="late", start_by=NOW + 90), NOW)
    assert {one.key for one in drained(made)[:6]} == {"a", "late"}


def test_who_was_promised_nothing_goes_all_the_same() -> None:
    promised = [entry(start_by=NOW + 99) for _ in range(40)]
    order = drained(queue(entry(key="free"), entry(key="free"), *promised))
    assert next(i for i, one in enumerate(order) if not one.promised) == SHARE - 1


def test_and_at_last_when_nobody_else_starts() -> None:
    """Deadlines hold every slot, and nobody starts for a long time."""
    free = entry(arrived=NOW)
    made = queue(free, entry(start_by=NOW + 99))
    made.start(queue_head(made), NOW)
    made.push(entry(start_by=NOW + 99), NOW)
    assert made.head("int8", NOW + PATIENCE_S - 1) is not free
    assert made.due(NOW + PATIENCE_S + 1)
    assert made.head("int8", NOW + PATIENCE_S + 1) is free


def queue_head(made: Queue) -> Waiting:
    head = made.head("int8", NOW)
    assert head is not None
    return head


class TestBounds:
    def test_in_all(self) -> None:
        made = queue(*(entry(start_by=NOW + 9) for _ in range(4)), most=4)
        with pytest.raises(QueueFull, match="4 requests wait already"):
            made.push(entry(start_by=NOW + 9), NOW)

    def test_per_key(self) -> None:
        made = queue(entry(), entry(), most_per_key=2)
        with pytest.raises(QueueFull, match="of this API key"):
            made.push(entry(), NOW)
        made.push(entry(key="b"), NOW)

    def test_those_without_a_deadline_leave_half_to_the_others(self) -> None:
        made = queue(*(entry() for _ in range(2)), most=4)
        with pytest.raises(QueueFull, match="without a deadline"):
            made.push(entry(), NOW)
        made.push(entry(start_by=NOW + 1), NOW)

    def test_leaving_makes_room(self) -> None:
        one = entry()
        made = queue(one, most=2)
        made.remove(one)
        made.remove(one)
        assert (len(made), made.waiting(5)) == (0, 0)
        made.push(entry(), NOW)


class TestFits:
    """Slots free every 0.1 s."""

    def test_an_empty_queue_takes_what_one_slot_takes(self) -> None:
        assert queue().fits(entry(start_by=NOW + 0.3), NOW, 0.1)
        assert not queue().fits(entry(start_by=NOW + 0.05), NOW, 0.1)

    def test_nobody_is_let_in_who_would_be_late(self) -> None:
        made = queue(*(entry(start_by=NOW + 1 + i / 10) for i in range(5)))
        assert made.fits(entry(start_by=NOW + 3.0), NOW, 0.1)
        assert not made.fits(entry(start_by=NOW + 1.45), NOW, 0.2)

    def test_nobody_is_let_in_who_makes_another_late(self) -> None:
        """The newcomer itself would be in time: it has the least slack."""
        made = queue(*(entry(start_by=NOW + 1.0) for _ in range(6)))
        assert not made.fits(entry(start_by=NOW + 0.5), NOW, 0.1)
        assert made.fits(entry(start_by=NOW + 0.5, priority=6), NOW, 0.1)  # lower ones make way

    def test_a_request_of_many_sequences_needs_many_slots(self) -> None:
        assert not queue().fits(entry(start_by=NOW + 0.5, sequences=8), NOW, 0.1)
        assert queue().fits(entry(start_by=NOW + 1.5, sequences=8), NOW, 0.1)

    def test_what_higher_priorities_take_is_not_there(self) -> None:
        made = queue()
        for i in range(400):
            made.started(entry(priority=9, start_by=NOW), NOW + i / 80)
        low = entry(start_by=NOW + 6.0)
        assert queue().fits(low, NOW + 5.0, 0.1)
        assert not made.fits(low, NOW + 5.0, 0.1)

    @settings(max_examples=100)
    @given(
        st.lists(
            st.tuples(st.floats(0.1, 5), st.sampled_from("ab"), st.integers(0, 9)), max_size=20
        ),
        st.floats(0.01, 0.3),
    )
    def test_what_could_be_met_fits(
        self, others: list[tuple[float, str, int]], interval_s: float
    ) -> None:
        made = queue()
        for slack, key, priority in others:
            made.push(entry(key=key, start_by=NOW + slack, priority=priority), NOW)
        newcomer = entry(start_by=NOW)
        wait_s = made.wait_s(newcomer, NOW, interval_s)
        assert made.fits(entry(start_by=NOW + wait_s + 1e-6), NOW, interval_s)
        assert not made.fits(entry(start_by=NOW - 0.1), NOW, interval_s)


def test_who_is_too_late_is_told() -> None:
    late, early, free = entry(start_by=NOW + 1), entry(start_by=NOW + 5), entry()
    made = queue(late, early, free)
    assert made.next_expiry == NOW + 1
    assert made.expired(NOW + 2) == [late]
    assert made.expired(NOW + 2) == []
    assert made.next_expiry == NOW + 5
    made.remove(early)
    assert made.next_expiry == math.inf


def test_a_move_to_another_level_keeps_the_age() -> None:
    old, young = entry(arrived=NOW - 30), entry(level="bf16", arrived=NOW - 1)
    made = queue(old, young)
    made.head("int8", NOW)
    made.remove(old)
    old.level = "bf16"
    made.push(old, NOW)
    assert drained(made, level="bf16") == [old, young]


steps = st.one_of(
    st.tuples(
        st.just("push"),
        st.sampled_from("abc"),
        st.integers(0, 9),
        st.none() | st.floats(0.0, 20.0),
    ),
    st.tuples(st.just("start"), st.sampled_from(["int8", "bf16"])),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.floats(0.0, 8.0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=80))
def test_it_agrees_with_a_plain_list(played: list[tuple[Any, ...]]) -> None:
    """Nobody is lost, nobody starts twice, bounds hold, and heads are of the first lane."""
    made, inside, now = Queue(20, 12), [], NOW
    for step in played:
        match step:
            case ("push", key, priority, slack):
                one = entry(
                    key=key,
                    level="int8" if priority % 2 else "bf16",
                    priority=priority,
                    arrived=now,
                    start_by=math.inf if slack is None else now + slack,
                )
                room = len(inside) < 20 and sum(o.key == key for o in inside) < 12
                free = one.promised or sum(not o.promised for o in inside) < 10
                try:
                    made.push(one, now)
                except QueueFull:
                    assert not (room and free)
                else:
                    assert room
                    assert free
                    inside.append(one)
            case ("start", level):
                due, head = made.due(now), made.head(level, now)
                there = [one for one in inside if one.level == level]
                assert (head is None) == (not there)
                if head is not None:
                    assert head in there
                    assert head.promised or due or not any(one.promised for one in there)
                    made.start(head, now)
                    inside.remove(head)
            case ("leave", index) if inside:
                made.remove(inside.pop(index % len(inside)))
            case ("wait", seconds):
                now += seconds
                late = made.expired(now)
                assert {id(o) for o in late} == {id(o) for o in inside if o.start_by < now}
                inside = [one for one in inside if one.start_by >= now]
        assert len(made) == len(inside)
        for priority in range(10):
            assert made.waiting(priority) == sum(one.priority == priority for one in inside)
        expiry = min((one.start_by for one in inside), default=math.inf)
        assert made.next_expiry == expiry


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**31))
def test_nobody_without_a_deadline_starves(priority: int, seed: int) -> None:
    """Beside twice as many requests with deadlines and higher priorities as there are slots, one
    slot a second: at most the others of its kind and a start in sixteen are waited for."""
    made = Queue(64, 64)
    for index in range(8):
        made.push(entry(key="free", priority=(priority + index) % 10), NOW)
    last = entry(key="poor", priority=0)
    made.push(last, NOW)
    for second in range(9 * SHARE + 64):
        now = NOW + second
        made.expired(now)
        for number in range(2):
            if len(made) < 60:
                made.push(
                    entry(
                        key=f"k{(seed + second) % 3}",
                        priority=9,
                        arrived=now,
                        start_by=now + 3.0 + number,
                    ),
                    now,
                )
        if second % 9 == 0 and len(made) < 60:
            made.push(entry(key="free", priority=9, arrived=now), now)
        head = made.head("int8", now)
        assert head is not None
        made.start(head, now)
        if head is last:
            return
    raise AssertionError("it starved")


@pytest.fixture(scope="module")
def reports() -> dict[float, Any]:
    return {load: simulate(load, 12_000, seed=7) for load in (1.0, 1.5, 3.0, 10.0)}


class TestAHost:
    """7 of 10 requests have deadlines; one key sends most of them. 24 slots of a second each."""

    def test_goodput_does_not_collapse(self, reports: dict[float, Any]) -> None:
        peak = max(report.goodput for report in reports.values())
        assert peak > 0.85
        for load in (3.0, 10.0):
            assert reports[load].goodput >= 0.9 * peak

    def test_what_was_accepted_is_kept(self, reports: dict[float, Any]) -> None:
        assert reports[1.0].attainment > 0.97
        assert reports[3.0].attainment > 0.95
        assert reports[10.0].attainment > 0.85  # of a short burst, until it knows what comes

    def test_refusals_are_early(self, reports: dict[float, Any]) -> None:
        for report in reports.values():
            early = report.counts["refused early"]
            assert report.late_refusals < 0.05 * max(early, 1_000)

    def test_nobody_starves(self, reports: dict[float, Any]) -> None:
        for report in reports.values():
            assert sum(n for lane, n in report.counts.items() if "best effort" in lane) > 0
            assert all(report.started_by_key[key] > 0 for key in KEYS)
        greedy = reports[3.0].started_by_key
        assert greedy[KEYS[0]] < 0.8 * sum(greedy.values())

    def test_it_is_the_same_every_time(self) -> None:
        assert simulate(3.0, 2_000, seed=5) == simulate(3.0, 2_000, seed=5)
