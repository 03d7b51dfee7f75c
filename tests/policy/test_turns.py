"""Turns at the slots of levels: the real admission, queue and decisions, over a ladder on paper."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from gateway.config import Limits
from gateway.policy import service
from gateway.policy.admission import Admission
from gateway.policy.budget import Sla
from gateway.policy.decide import decide
from gateway.policy.decision import Ask, Decision
from gateway.policy.house import Look, Wish
from gateway.policy.moment import Moment
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.variant import LadderSnapshot
from tests.policy.ladders import ladder, with_level

SLOTS = 2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Counted:
    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.left: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def queue_length(self, priority: int, waiting: int) -> None:
        self.lengths[priority] = waiting

    def queue_left(self, priority: int, outcome: str, seconds: float) -> None:
        del priority, seconds
        self.left[outcome] += 1

    def refused(self, reason: str) -> None:
        self.reasons[reason] += 1


class Front:
    """A front over a ladder whose engines show what holds their slots. Requests take 33 ms to the
    first token at int8 and 6 ms for each of 100 more."""

    def __init__(self, **limits: int) -> None:
        self.clock, self.counted = Clock(), Counted()
        self.admission = Admission(Limits(**limits), self.clock, self.counted)
        self.house = self.admission.house("m")
        self.predictor = Predictor()
        self.moment = Moment()

    @property
    def snapshot(self) -> LadderSnapshot:
        found = ladder()
        for facts in found.levels:
            held = self.house.held.get(facts.level, 0)
            stats = replace(facts.stats, running=held, remaining_tokens=50 * held)
            found = with_level(found, facts.level, stats=stats, max_running=SLOTS)
        return found

    def wish(
        self, key: str = "a", *, patient: bool | None = None, sequences: int = 1, **policy: Any
    ) -> Wish:
        rules = Policy(**({"name": "p", "levels": ("int8",), "confidence": 0.5} | policy))
        bounds = [b for b in (rules.ttft_ms, rules.latency_ms) if b is not None]
        ask = Ask("m", 100, 101, None, Sla())

        def now(look: Look) -> Decision:
            moment = self.moment if not look.forced else Moment()
            asked = replace(ask, moment=replace(moment, waited_ms=1000 * look.waited_s))
            seen = service.beside(self.snapshot, look.ahead, asked)
            return decide(asked, rules, seen, self.predictor.predict)

        return Wish(
            model="m",
            key=key,
            priority=rules.priority,
            sequences=sequences,
            arrived=self.clock.now,
            decide=now,
            deadline=self.clock.now + min(bounds) / 1000 if bounds else float("inf"),
            patient=not bounds if patient is None else patient,
        )


class Caller:
    """One request that stays until it is told to leave."""

    def __init__(self, front: Front, wish: Wish) -> None:
        self.decision: Decision | None = None
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(front, wish))

    async def _run(self, front: Front, wish: Wish) -> None:
        async with front.admission.turn(wish) as decision:
            self.decision = decision
            if decision.level is not None:
                await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    front = Front()
    yield front
    if front.house.timer is not None:
        front.house.timer.cancel()


async def callers(front: Front, *wishes: Wish) -> list[Caller]:
    found = []
    for wish in wishes:
        found.append(Caller(front, wish))
        await settled()
    return found


def served(found: list[Caller]) -> list[str | None]:
    return [one.decision.level if one.decision else None for one in found]


async def test_the_surplus_waits_here_and_goes_on_in_turn(front: Front) -> None:
    found = await callers(front, *(front.wish() for _ in range(4)))
    assert served(found) == ["int8", "int8", None, None]
    assert front.house.held == {"int8": SLOTS}
    assert front.counted.lengths == {5: 2}
    await found[1].leave()
    assert served(found) == ["int8", "int8", "int8", None]
    for one in (found[0], found[2], found[3]):
        await one.leave()
    assert (front.house.held, len(front.house.queue), front.house.places) == ({}, 0, {})
    assert front.counted.left == {"served": 2}


async def test_a_deadline_goes_before_those_who_have_none(front: Front) -> None:
    found = await callers(
        front, front.wish(), front.wish(), front.wish(), front.wish(ttft_ms=5000, priority=0)
    )
    assert served(found) == ["int8", "int8", None, None]
    await found[0].leave()
    assert served(found) == ["int8", "int8", None, "int8"]
    for one in (found[1], found[3], found[2]):
        await one.leave()


async def test_what_cannot_start_in_time_is_refused_at_once(front: Front) -> None:
    """Both slots are held; about 50 tokens of 6 ms or more are left of each."""
    found = await callers(front, front.wish(), front.wish())
    (late,) = await callers(front, front.wish(ttft_ms=100, on_miss="reject"))
    assert late.decision is not None
    assert (late.decision.action, late.decision.code) == ("reject", "busy")
    assert late.decision.retry_after_s is not None
    offer = late.decision.could_meet
    assert offer is not None
    (again,) = await callers(front, front.wish(**offer, on_miss="reject"))
    assert again.decision is None  # it waits
    await found[0].leave()
    assert served([again]) == ["int8"]
    for one in (found[1], again):
        await one.leave()
    assert front.counted.reasons["busy"] == 1


async def test_what_a_full_queue_could_meet_it_takes(front: Front) -> None:
    front.house.holds["int8"] = 0.6
    found = await callers(front, front.wish(), front.wish())
    waiting, refused = [], None
    for _ in range(30):
        (one,) = await callers(front, front.wish(ttft_ms=2000, on_miss="reject"))
        if one.decision is not None:
            refused = one.decision
            break
        waiting.append(one)
    assert waiting
    assert refused is not None
    assert refused.could_meet is not None
    assert refused.could_meet["ttft_ms"] > 2000
    (again,) = await callers(front, front.wish(**refused.could_meet, on_miss="reject"))
    assert again.decision is None  # it waits
    for one in (*found, *waiting, again):
        one.task.cancel()
    await asyncio.gather(*(one.task for one in (*found, *waiting, again)), return_exceptions=True)
    assert (front.house.held, len(front.house.queue), front.house.places) == ({}, 0, {})


async def test_patience_turns_a_lost_promise_into_a_wait(front: Front) -> None:
    found = await callers(front, front.wish(), front.wish())
    (near,) = await callers(front, front.wish(ttft_ms=100, patient=True))
    assert near.decision is None
    await found[0].leave()
    assert served([near]) == ["int8"]
    for one in (found[1], near):
        await one.leave()


async def test_who_is_not_served_in_time_is_told_before_it_is_late(front: Front) -> None:
    found = await callers(front, front.wish(), front.wish())
    (one,) = await callers(front, front.wish(ttft_ms=3000, on_miss="reject"))
    assert one.decision is None
    front.clock.now += 2.9  # the slots are held longer than anybody thought
    await asyncio.sleep(0.3)
    assert one.decision is None  # it could still be
    front.clock.now += 0.09
    await asyncio.sleep(0.3)
    assert one.decision is not None
    assert (one.decision.action, one.decision.code) == ("reject", "busy")
    assert one.decision.could_meet is not None
    assert front.counted.left == {"refused": 1}
    for other in found:
        await other.leave()


async def test_another_level_serves_when_the_best_is_not_free_in_time(front: Front) -> None:
    """bf16 is the best, and full for longer than thought; int8 is free."""
    both: dict[str, Any] = {"levels": ("bf16", "int8")}
    found = await callers(front, front.wish(**both), front.wish(**both))
    assert served(found) == ["bf16", "bf16"]
    (one,) = await callers(front, front.wish(ttft_ms=3000, on_miss="reject", **both))
    assert one.decision is None
    front.clock.now += 2.99
    await asyncio.sleep(0.3)
    assert one.decision is not None
    assert one.decision.action == "reject" or one.decision.level == "int8"
    for other in found:
        await other.leave()
    if one.decision.level is not None:
        await one.leave()


async def test_callers_who_hang_up_leave_nothing_behind(front: Front) -> None:
    found = await callers(front, *(front.wish() for _ in range(6)))
    for one in found[1:5]:
        one.task.cancel()
    await asyncio.gather(*(one.task for one in found[1:5]), return_exceptions=True)
    await settled()
    assert served([found[5]]) == ["int8"]
    assert front.house.held == {"int8": 2}
    for one in (found[0], found[5]):
        await one.leave()
    assert (front.house.held, len(front.house.queue), front.house.places) == ({}, 0, {})


async def test_a_slot_given_to_a_caller_who_is_gone_is_given_back(front: Front) -> None:
    found = await callers(front, *(front.wish() for _ in range(4)))
    found[0]._leave.set()
    await asyncio.sleep(0)  # the slot is given to the third before it can know
    found[2].task.cancel()
    await settled()
    assert served([found[3]]) == ["int8"]
    for one in (found[1], found[3]):
        await one.leave()
    assert front.house.held == {}


async def test_bounds_of_the_queue() -> None:
    front = Front(max_waiting=4, max_waiting_per_key=2)
    found = await callers(front, front.wish(), front.wish(), *(front.wish("b") for _ in range(3)))
    last = found[-1].decision
    assert last is not None
    assert (last.action, last.code) == ("reject", "busy")
    assert "wait already" in last.reason
    assert front.counted.reasons == {"queue": 1}
    for one in found[:4]:
        one.task.cancel()
    await asyncio.gather(*(one.task for one in found[:4]), return_exceptions=True)


async def test_more_sequences_than_slots_go_alone(front: Front) -> None:
    found = await callers(front, front.wish(), front.wish(sequences=5), front.wish())
    assert served(found) == ["int8", None, None]
    await found[0].leave()
    assert served(found) == ["int8", "int8", None]
    await found[1].leave()
    assert served(found)[2] == "int8"
    await found[2].leave()


async def test_best_effort_waits_while_it_would_break_a_promise(front: Front) -> None:
    front.moment = Moment(token_ms=5.0)
    (one,) = await callers(front, front.wish())
    assert one.decision is None
    front.moment = Moment()
    await asyncio.sleep(0.3)
    assert served([one]) == ["int8"]
    await one.leave()


async def test_what_only_the_load_refuses_waits_while_its_deadline_lets_it(front: Front) -> None:
    front.moment = Moment(token_ms=5.0)
    (strict,) = await callers(front, front.wish(ttft_ms=1000, on_miss="reject"))
    assert strict.decision is None
    front.moment = Moment()
    await asyncio.sleep(0.3)
    assert served([strict]) == ["int8"]
    await strict.leave()


async def test_and_is_refused_when_it_is_too_late(front: Front) -> None:
    front.moment = Moment(token_ms=5.0)
    (strict,) = await callers(front, front.wish(ttft_ms=1000, on_miss="reject"))
    assert strict.decision is None
    front.clock.now += 0.98  # 33 ms to the first token no longer fit
    await asyncio.sleep(0.3)
    assert strict.decision is not None
    assert (strict.decision.action, strict.decision.code) == ("reject", "busy")
    assert front.counted.left["refused"] == 1


async def test_a_pace_that_nobody_can_wait_for_is_refused_at_once(front: Front) -> None:
    front.moment = Moment(token_ms=5.0)
    (strict,) = await callers(front, front.wish(patient=False, tpot_ms=20, on_miss="reject"))
    assert strict.decision is not None
    assert (strict.decision.action, strict.decision.code) == ("reject", "busy")


async def test_but_not_for_ever(front: Front) -> None:
    front.moment = Moment(token_ms=5.0)
    (one,) = await callers(front, front.wish())
    front.clock.now += 11.0
    await asyncio.sleep(0.3)
    assert served([one]) == ["int8"]
    await one.leave()


async def test_an_error_on_the_way_reaches_its_caller_alone(front: Front) -> None:
    found = await callers(front, front.wish(), front.wish())
    broken = front.wish()
    (first,) = await callers(front, broken)
    (second,) = await callers(front, front.wish())

    def fails(look: Look) -> Decision:
        raise ValueError("no ladder")

    broken.decide = fails
    await found[0].leave()
    with pytest.raises(ValueError, match="no ladder"):
        await first.task
    await settled()
    assert served([second]) == ["int8"]
    for one in (found[1], second):
        await one.leave()
