"""Who may come in, and when each one's turn is: bounds, slots of levels, and the queue before them.

A level's slots are held by whoever it serves. A request whose level has no free slot waits in
`queue`, which is pure; here are the clock, the timers and the futures. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

from gateway.config import Limits
from gateway.errors import Overloaded
from gateway.policy import service
from gateway.policy.decision import Decision
from gateway.policy.house import House, Look, Place, Unwatched, Watch, Wish
from gateway.policy.queue import QueueFull, Waiting

ANONYMOUS: Final = ""
RETRY_SECONDS: Final = (1.0, 60.0)
_WEIGHT: Final = 0.1  # of the newest stay in the running mean
_TICK_S: Final = 0.25  # how often those who wait are looked at when nothing happens
_TRIES: Final = 8  # decisions in one look at one level
_How = Callable[[House, Place, float], bool]
ANYWHERE: Final = ""  # the lane of those that no level may serve just now


class Admission:
    """Permits and turns for requests. Keys that hold none take no memory."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.perf_counter,
        watch: Watch | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> None:
        """`shares`: requests at once of keys that have a bound of their own."""
        self._limits = limits
        self._clock = clock
        self._watch: Watch = watch or Unwatched()
        self._shares = shares or {}
        self._houses: dict[str, House] = {}
        self._held: dict[str, int] = {}
        self._in_flight = 0
        self._mean_stay: float | None = None
        self.admitted = 0
        self.refused = 0

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def held_by(self, key: str | None) -> int:
        """Permits that a key holds now."""
        return self._held.get(key or ANONYMOUS, 0)

    @property
    def keys(self) -> int:
        """How many keys hold a permit now."""
        return len(self._held)

    def admit(self, key: str | None) -> Permit:
        """A permit to be held with `with` or `async with`; it is taken on entering.

        Entering raises `Overloaded`, with `retry_after`, when the house or the key's share is full.
        """
        return Permit(self, key or ANONYMOUS)

    # -- turns ------------------------------------------------------------------------------------

    def house(self, model: str) -> House:
        """What is known of a model's slots, queue, promises and past."""
        house = self._houses.get(model)
        if house is None:
            house = self._houses[model] = House(self._limits)
        return house

    def look(self, model: str, priority: int = 5) -> Look:
        """With what a request that came in now, without a deadline, would be decided on."""
        now = self._clock()
        return Look(now, 0.0, self.house(model).ahead(priority, math.inf))

    @asynccontextmanager
    async def turn(self, wish: Wish) -> AsyncIterator[Decision]:
        """Decide, wait for a slot if there is none, decide again; the slot is held while the block
        runs. A decision to reject, or to wait for a build, holds none."""
        decision = await self._seat(wish)
        began = self._clock()
        wish.holds = {} if decision.level is None else {decision.level: wish.sequences}
        try:
            yield decision
        finally:
            for level, sequences in wish.holds.items():
                self._release(wish.model, level, sequences, self._clock() - began)

    def shift(self, wish: Wish, origin: str, target: str, sequences: int) -> None:
        """Sequences that are being served go on at another level; so do their slots, if any."""
        if wish.holds.get(origin, 0) < sequences:
            return
        self.house(wish.model).take(target, sequences)
        wish.holds[target] = wish.holds.get(target, 0) + sequences
        wish.holds[origin] -= sequences
        if not wish.holds[origin]:
            del wish.holds[origin]
        self._release(wish.model, origin, sequences, None)

    async def _seat(self, wish: Wish) -> Decision:
        house, now = self.house(wish.model), self._clock()
        decision = self._decide(house, wish, now)
        level = decision.level
        if level is None:
            entry = self._hopeful(house, wish, decision, now)
            if entry is not None:
                return await self._wait(house, wish, decision, entry)
            if not (wish.patient and service.blocked(decision)):
                return self._told(self._honest(house, wish, decision, now))
            return await self._wait(house, wish, decision, self._entry(wish, decision, ANYWHERE))
        if house.enough(level, wish.sequences) and house.queue.head(level, now) is None:
            house.take(level, wish.sequences)
            if house.scarce(level):
                house.queue.started(self._entry(wish, decision, level), now)
            return decision
        entry = self._entry(wish, decision, level)
        interval = house.interval_s(level, entry.hold_s)
        if entry.promised and not house.queue.fits(entry, now, interval):
            if not wish.patient:
                return self._told(self._crowded(house, wish, entry, decision))
            entry.start_by = math.inf
        return await self._wait(house, wish, decision, entry)

    @staticmethod
    def _hopeful(house: House, wish: Wish, decision: Decision, now: float) -> Waiting | None:
        """A place in the queue for what only the present load refuses, as long as its deadline
        leaves time for that to pass."""
        hope = None if wish.patient else service.hope(decision, wish.arrived)
        if hope is None or hope.start_by <= now:
            return None
        entry = _waiting(wish, hope.level, hope.start_by, hope.hold_s)
        interval = house.interval_s(hope.level, hope.hold_s)
        return entry if house.queue.fits(entry, now, interval) else None

    def _decide(
        self, house: House, wish: Wish, now: float, *, first: bool = False, forced: bool = False
    ) -> Decision:
        """`first`: nobody is ahead but those who hold slots."""
        if first or not len(house.queue):
            ahead = house.held
        else:
            ahead = house.ahead(wish.priority, wish.deadline)
        decision = wish.decide(Look(now, now - wish.arrived, ahead, forced))
        if decision.case is not None:
            house.learn_slots(decision.case.snapshot)
        return decision

    def _entry(self, wish: Wish, decision: Decision, level: str) -> Waiting:
        hold_s, start_by = service.of(decision, wish.arrived)
        return _waiting(wish, level, start_by, hold_s)

    async def _wait(self, house: House, wish: Wish, decision: Decision, entry: Waiting) -> Decision:
        try:
            house.queue.push(entry, self._clock())
        except QueueFull as full:
            self._watch.refused("queue")
            return self._crowded(house, wish, entry, decision, str(full))
        place = Place(wish, entry, asyncio.get_running_loop().create_future())
        house.places[entry.number] = place
        self._watch.queue_length(wish.priority, house.queue.waiting(wish.priority))
        self._set_timer(wish.model, house)
        outcome = "gone"
        try:
            decision = await place.future
            outcome = "served" if decision.action == "serve" else "refused"
            return decision
        finally:
            self._leave(house, place, outcome)

    def _leave(self, house: House, place: Place, outcome: str) -> None:
        """However the wait ended; slots given to a caller who is gone are given back."""
        wish, entry, future = place.wish, place.entry, place.future
        house.queue.remove(entry)
        house.places.pop(entry.number, None)
        self._watch.queue_length(wish.priority, house.queue.waiting(wish.priority))
        self._watch.queue_left(wish.priority, outcome, self._clock() - wish.arrived)
        granted = outcome == "gone" and future.done() and not future.cancelled()
        if granted and future.exception() is None and (level := future.result().level) is not None:
            self._release(wish.model, level, wish.sequences, None)

    def _release(self, model: str, level: str, sequences: int, seconds: float | None) -> None:
        house = self.house(model)
        house.give_back(level, sequences, seconds)
        if len(house.queue):
            self._pump(model)

    # -- the queue --------------------------------------------------------------------------------

    def _set_timer(self, model: str, house: House) -> None:
        if house.timer is not None:
            house.timer.cancel()
            house.timer = None
        if len(house.queue):
            wait = min(_TICK_S, max(0.0, house.queue.next_expiry - self._clock()))
            loop = asyncio.get_running_loop()
            house.timer = loop.call_later(wait + 1e-3, self._pump, model)

    def _pump(self, model: str) -> None:
        """Give free slots to those whose turn it is, and an answer to those who are too late."""
        house, now = self.house(model), self._clock()
        for entry in house.queue.expired(now):
            self._answer(house, house.places[entry.number], now, self._too_late)
        for level in house.queue.levels():
            for _ in range(_TRIES):
                head = house.queue.head(level, now)
                if head is None or not house.enough(level, head.sequences):
                    break
                if not self._answer(house, house.places[head.number], now, self._next):
                    break
        self._set_timer(model, house)

    @staticmethod
    def _answer(house: House, place: Place, now: float, how: _How) -> bool:
        """Decide anew on one who waits; an error on the way is its own."""
        if place.future.done():  # its caller hung up just now
            house.queue.remove(place.entry)
            return True
        try:
            return how(house, place, now)
        except Exception as error:
            house.queue.remove(place.entry)
            if not place.future.done():
                place.future.set_exception(error)
            return True

    def _next(self, house: House, place: Place, now: float) -> bool:
        """Serve, move or answer who goes first at a level; False: nobody can be for now."""
        wish, entry = place.wish, place.entry
        forced = not entry.promised and house.queue.due(now)
        decision = self._decide(house, wish, now, first=True, forced=forced)
        to = decision.level
        if to is None:
            if decision.code == "busy" and entry.promised:
                return False  # until it is too late
            if wish.patient and service.blocked(decision):
                return False
            house.queue.remove(entry)
            self._grant(place, self._told(decision))
            return True
        elsewhere = house.enough(to, wish.sequences) and house.queue.head(to, now) is None
        if to != entry.level and not elsewhere:
            house.queue.remove(entry)
            entry.level = to
            house.queue.push(entry, now)
            return True
        house.queue.start(entry, now)
        house.take(to, wish.sequences)
        self._grant(place, decision)
        return True

    def _too_late(self, house: House, place: Place, now: float) -> bool:
        """Its level will not be free in time: another one may be; else say so now."""
        wish, entry = place.wish, place.entry
        decision = self._decide(house, wish, now, first=True)
        to = decision.level
        if to is not None and house.enough(to, wish.sequences) and not decision.misses:
            house.take(to, wish.sequences)
            self._grant(place, decision)
            return True
        if wish.patient:
            entry.start_by = math.inf
            try:
                house.queue.push(entry, now)
                return True
            except QueueFull:
                pass  # as one that never was promised anything
        self._grant(place, self._told(self._crowded(house, wish, entry, decision)))
        return True

    def _honest(self, house: House, wish: Wish, decision: Decision, now: float) -> Decision:
        """A refusal whose offer counts the line before the slots."""
        level = service.nearest(decision) if decision.could_meet else None
        if level is None or house.enough(level, wish.sequences):
            return decision
        entry = self._entry(wish, decision, level)
        return service.behind(decision, level, house.wait_s(entry, now))

    def _crowded(
        self,
        house: House,
        wish: Wish,
        entry: Waiting,
        decision: Decision,
        why: str | None = None,
    ) -> Decision:
        """The refusal of a wish for which there is no slot in time, with what a request that came
        now, and after everybody who has a deadline, could be promised."""
        now = self._clock()
        last = wish.decide(Look(now, 0.0, house.ahead(wish.priority, sys.float_info.max)))
        return service.crowded(decision, last, house.wait_s(entry, now), why)

    @staticmethod
    def _grant(place: Place, decision: Decision) -> None:
        if not place.future.done():
            place.future.set_result(decision)

    def _told(self, decision: Decision) -> Decision:
        if decision.action == "reject":
            self._watch.refused(decision.code)
        return decision

    # -- permits ----------------------------------------------------------------------------------

    def _take(self, key: str) -> float:
        limits, mine = self._limits, self._held.get(key, 0)
        share = self._shares.get(key, limits.max_concurrent_per_key)
        if self._in_flight >= limits.max_concurrent:
            self._watch.refused("concurrency")
            raise self._refusal("the gateway serves", limits.max_concurrent, self._in_flight)
        if mine >= share:
            self._watch.refused("key_concurrency")
            raise self._refusal("this API key has", share, mine)
        self._held[key] = mine + 1
        self._in_flight += 1
        self.admitted += 1
        return self._clock()

    def _give_back(self, key: str, since: float) -> None:
        left = self._held[key] - 1
        if left:
            self._held[key] = left
        else:
            del self._held[key]
        self._in_flight -= 1
        stay = max(0.0, self._clock() - since)
        mean = self._mean_stay
        self._mean_stay = stay if mean is None else mean + _WEIGHT * (stay - mean)

    def _refusal(self, who: str, limit: int, together: int) -> Overloaded:
        """With n in flight that stay s seconds each, a place is free about every s / n seconds."""
        self.refused += 1
        low, high = RETRY_SECONDS
        retry = min(high, max(low, (self._mean_stay or 0.0) / together))
        return Overloaded(
            f"{who} {limit} requests at once, which is its limit; retry later", retry_after=retry
        )


def _waiting(wish: Wish, level: str, start_by: float, hold_s: float) -> Waiting:
    return Waiting(
        key=wish.key or ANONYMOUS,
        level=level,
        priority=wish.priority,
        arrived=wish.arrived,
        start_by=start_by,
        hold_s=hold_s,
        sequences=wish.sequences,
    )


class Permit:
    """The right to be served once; given back exactly once, however the block is left."""

    __slots__ = ("_admission", "_key", "_since")

    def __init__(self, admission: Admission, key: str) -> None:
        self._admission = admission
        self._key = key
        self._since: float | None = None

    def __enter__(self) -> Self:
        if self._since is not None:
            raise RuntimeError("a permit is held once")
        self._since = self._admission._take(self._key)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        since, self._since = self._since, None
        if since is not None:
            self._admission._give_back(self._key, since)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)
