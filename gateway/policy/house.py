"""What an admission shell keeps of one model: who wants a slot, who holds one, who waits. No clock.

Plain state and questions about it; `admission` drives it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from gateway.config import Limits
from gateway.policy.decision import Decision
from gateway.policy.promises import Promises
from gateway.policy.queue import Queue, Waiting
from gateway.policy.recent import Recent
from gateway.variants.variant import LadderSnapshot, LevelFacts

WEIGHT: Final = 0.1  # of the newest hold in the running mean


class Watch(Protocol):
    """Who counts what happens here; `Metrics` does."""

    def queue_length(self, priority: int, waiting: int) -> None: ...
    def queue_left(self, priority: int, outcome: str, seconds: float) -> None: ...
    def refused(self, reason: str) -> None: ...


class Unwatched:
    """Nobody counts."""

    def queue_length(self, priority: int, waiting: int) -> None: ...
    def queue_left(self, priority: int, outcome: str, seconds: float) -> None: ...
    def refused(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Look:
    """With what a decision is made.

    Attributes:
        now: seconds of the clock.
        waited_s: since the request came in.
        ahead: sequences that hold slots, or will before this one, by level.
        forced: the turn of a request without a deadline has come, whatever others were promised.
    """

    now: float
    waited_s: float = 0.0
    ahead: Mapping[str, int] = field(default_factory=dict)
    forced: bool = False


@dataclass(slots=True, eq=False)
class Wish:
    """One request that wants a slot.

    Attributes:
        arrived: seconds of the clock.
        decide: decides on the ladder as it is.
        deadline: when the first token, or the whole answer, has to be there; inf: whenever.
        patient: it may wait although no promise can be made to it.
        holds: slots it has while it is served, by level.
    """

    model: str
    key: str | None
    priority: int
    sequences: int
    arrived: float
    decide: Callable[[Look], Decision]
    deadline: float = math.inf
    patient: bool = False
    holds: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Place:
    """A wish in the queue, and the promise of an answer to it."""

    wish: Wish
    entry: Waiting
    future: asyncio.Future[Decision]


class House:
    """One model's slots and queue, and what decisions have to know of both."""

    def __init__(self, limits: Limits) -> None:
        self.queue = Queue(limits.max_waiting, limits.max_waiting_per_key)
        self.promises = Promises()
        self.recent = Recent()
        self.held: dict[str, int] = {}
        self.slots: dict[str, float] = {}
        self.places: dict[int, Place] = {}
        self.holds: dict[str, float] = {}  # mean seconds that a slot was held, by level
        self.timer: asyncio.TimerHandle | None = None

    def free(self, level: str) -> float:
        return self.slots.get(level, math.inf) - self.held.get(level, 0)

    def enough(self, level: str, sequences: int) -> bool:
        """More sequences than a level has slots may go when nobody else is there."""
        return self.free(level) >= sequences or not self.held.get(level)

    def scarce(self, level: str) -> bool:
        """Are half of its slots held? Until then nobody has to know who takes how many."""
        return self.held.get(level, 0) >= 0.5 * self.slots.get(level, math.inf)

    def interval_s(self, level: str, hold_s: float) -> float:
        """Seconds between two slots of a full level that become free."""
        return self.holds.get(level, hold_s) / max(1.0, min(self.slots.get(level, 1.0), 1e6))

    def learn_slots(self, snapshot: LadderSnapshot) -> None:
        """Take over the slots of a ladder's levels; they never change while the gateway runs."""
        if len(self.slots) != len(snapshot.levels):
            self.slots = {facts.level: slots_of(facts) for facts in snapshot.levels}

    def take(self, level: str, sequences: int) -> None:
        self.held[level] = self.held.get(level, 0) + sequences

    def give_back(self, level: str, sequences: int, seconds: float | None) -> None:
        """`seconds`: how long they were held; None: they were never used."""
        left = self.held[level] - sequences
        if left:
            self.held[level] = left
        else:
            del self.held[level]
        if seconds is not None:
            mean = self.holds.get(level, seconds)
            self.holds[level] = mean + WEIGHT * (seconds - mean)

    def wait_s(self, entry: Waiting, now: float) -> float:
        """How long a newcomer waits that comes after everybody who has a deadline."""
        return self.queue.wait_s(entry, now, self.interval_s(entry.level, entry.hold_s))

    def ahead(self, priority: int, start_by: float) -> dict[str, int]:
        """Sequences that hold slots, or will before a newcomer of that urgency, by level."""
        found = dict(self.held)
        for level in self.queue.levels():
            found[level] = found.get(level, 0) + self.queue.ahead(level, priority, start_by)
        return found


def slots_of(facts: LevelFacts) -> float:
    """Sequences that a level can decode at once; another server's are its own affair."""
    unknown = not facts.max_running or facts.family == "upstream"
    return math.inf if unknown else float(facts.max_running)
