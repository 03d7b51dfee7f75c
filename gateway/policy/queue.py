"""Who goes next: requests that wait in the gateway for a slot of a level. Pure: no clock, no I/O.

Of every level, requests with a deadline wait in one lane and requests without in another:

    1. The lane of deadlines goes first. The other one gets every 16th start all the same, and one
       start when its oldest has waited 10 s: it never starves and takes at most a sixteenth of
       what others were promised.
    2. In a lane, the highest priority goes first. Whoever waits 5 s rises by one.
    3. Of one priority, keys share by the time that they hold slots (start-time fair queueing: Goyal
       et al., 1996), and may run ahead of each other by 2 s of it, so that a burst of tight
       deadlines is met without one key pushing out all others.
    4. Of the keys whose turn it may be, the request with the least slack goes, that is the one that
       has to start the earliest; without deadlines, the oldest.

Bounded: in all, per key, and for those without a deadline. `fits` says before anybody waits whether
all deadlines can still be kept. Owned by whoever has the clock; see `admission`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

PRIORITIES: Final = 10
SHARE: Final = 16  # one of so many starts is for requests without a deadline
PATIENCE_S: Final = 10.0  # and one is when the oldest of them has waited so long
AGE_S: Final = 5.0  # of waiting, for one priority more
QUANTUM_S: Final = 2.0  # of held slots, by which one key may run ahead of another
_MEMORY_S: Final = 5.0  # of what priorities take
_LEAST_LEFT: Final = 0.02  # share of a level's slots that higher priorities are taken to leave
_FORGOTTEN: Final = 0.05  # sequences, faded: of a key that took so few, none is remembered
_MOST_KEYS: Final = 4096  # whose past is remembered while others wait


class QueueFull(Exception):
    """No place to wait; the message says whose."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One request that waits. Times in seconds of the owner's clock.

    Attributes:
        start_by: when it has to start to keep its promise; inf: nothing was promised.
        hold_s: how long it is expected to hold its slots.
        sequences: slots that it needs.
    """

    key: str
    level: str
    priority: int
    arrived: float
    start_by: float = math.inf
    hold_s: float = 1.0
    sequences: int = 1
    number: int = field(default=-1, init=False)
    rank: int = field(default=0, init=False)  # its priority with what it gained by waiting
    since: float = field(default=0.0, init=False)  # when it got that rank
    queued: bool = field(default=False, init=False)

    @property
    def promised(self) -> bool:
        return self.start_by < math.inf

    @property
    def urgency(self) -> tuple[float, int]:
        return (self.start_by if self.promised else self.arrived, self.number)


_Heap = list[tuple[tuple[float, int], Waiting]]


class _Lane:
    """Who waits at one level with, or without, a deadline: by rank, then by key, then by slack."""

    def __init__(self) -> None:
        self.size = 0
        self._sizes = [0] * PRIORITIES
        self._heaps: list[dict[str, _Heap]] = [{} for _ in range(PRIORITIES)]
        self._oldest: list[deque[Waiting]] = [deque() for _ in range(PRIORITIES)]
        self._arrivals: deque[Waiting] = deque()

    def push(self, entry: Waiting) -> None:
        self.oldest()
        self._arrivals.append(entry)
        self._enter(entry)

    def drop(self, entry: Waiting) -> None:
        """Account for an entry that left; its places are cleared when they are met."""
        self.size -= 1
        self._sizes[entry.rank] -= 1

    def oldest(self) -> Waiting | None:
        while self._arrivals and not self._arrivals[0].queued:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def head(self, now: float, held: dict[str, float]) -> Waiting | None:
        """Who goes first; `held`: the time that every waiting key has had."""
        if not self.size:
            return None
        self._age(now)
        rank = max(rank for rank, size in enumerate(self._sizes) if size)
        heads = list(self._heads(rank))
        least = min(held.get(entry.key, 0.0) for entry in heads)
        ahead = least + QUANTUM_S
        entitled = (entry for entry in heads if held.get(entry.key, 0.0) <= ahead)
        return min(entitled, key=lambda entry: entry.urgency)

    def _enter(self, entry: Waiting) -> None:
        self.size += 1
        self._sizes[entry.rank] += 1
        heap = self._heaps[entry.rank].setdefault(entry.key, [])
        heapq.heappush(heap, (entry.urgency, entry))
        self._oldest[entry.rank].append(entry)

    def _heads(self, rank: int) -> Iterator[Waiting]:
        """The most urgent of every key."""
        heaps = self._heaps[rank]
        for key in list(heaps):
            heap = heaps[key]
            while heap and not _at(heap[0][1], rank):
                heapq.heappop(heap)
            if heap:
                yield heap[0][1]
            else:
                del heaps[key]

    def _age(self, now: float) -> None:
        for rank in range(PRIORITIES - 1):
            line = self._oldest[rank]
            while line and (not _at(line[0], rank) or now - line[0].since >= AGE_S):
                entry = line.popleft()
                if _at(entry, rank):
                    self.drop(entry)
                    entry.rank, entry.since = rank + 1, now
                    self._enter(entry)
        top = self._oldest[-1]
        while top and not _at(top[0], PRIORITIES - 1):
            top.popleft()


def _late(slots: int) -> float:
    """In how many intervals nine of ten times so many slots have become free, when they do so
    independently of each other."""
    return slots + 1.28 * math.sqrt(slots)


def _at(entry: Waiting, rank: int) -> bool:
    return entry.queued and entry.rank == rank


class _Rates:
    """Sequences per second that each priority and key took lately at a level; the past fades."""

    def __init__(self) -> None:
        self._counts = [0.0] * PRIORITIES
        self._keys: dict[str, float] = {}
        self._at = -math.inf

    def took(self, entry: Waiting, now: float) -> None:
        self._fade(now)
        self._counts[entry.priority] += entry.sequences
        self._keys[entry.key] = self._keys.get(entry.key, 0.0) + entry.sequences

    def above(self, priority: int, now: float) -> float:
        self._fade(now)
        return sum(self._counts[priority + 1 :]) / _MEMORY_S

    def others(self, key: str, now: float) -> tuple[float, int]:
        """(what other keys took, how many they are)."""
        self._fade(now)
        mine = self._keys.get(key, 0.0)
        taken = (sum(self._counts) - mine) / _MEMORY_S
        return max(0.0, taken), len(self._keys) - (key in self._keys)

    def _fade(self, now: float) -> None:
        if now > self._at:
            left = math.exp((self._at - now) / _MEMORY_S)
            self._counts = [left * count for count in self._counts]
            self._keys = {
                key: left * count for key, count in self._keys.items() if left * count > _FORGOTTEN
            }
            self._at = now


class Queue:
    """Everybody who waits for a slot, at all levels."""

    def __init__(self, most: int, most_per_key: int) -> None:
        """`most`: entries in all; half of them may be without a deadline."""
        self._most = most
        self._most_per_key = most_per_key
        self._most_unpromised = max(1, most // 2)
        self._lanes: dict[tuple[str, bool], _Lane] = {}
        self._deadlines: dict[str, list[tuple[float, int, Waiting]]] = {}
        self._rates: dict[str, _Rates] = {}
        self._expiry: list[tuple[float, int, Waiting]] = []
        self._numbers = itertools.count()
        self._keys: Counter[str] = Counter()
        self._priorities: Counter[int] = Counter()
        self._held: dict[str, float] = {}
        self._starts = 0  # since one without a deadline went
        self._last = -math.inf  # when that was
        self._unpromised = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def waiting(self, priority: int) -> int:
        """How many of a priority (as asked for) wait."""
        return self._priorities[priority]

    def levels(self) -> list[str]:
        """Levels that somebody waits for."""
        return list(dict.fromkeys(level for (level, _), lane in self._lanes.items() if lane.size))

    def ahead(self, level: str, priority: int, start_by: float = math.inf) -> int:
        """Sequences at a level that go before a newcomer that has to start by then."""
        others = 0
        if start_by == math.inf:
            lane = self._lanes.get((level, False))
            others = lane.size if lane is not None else 0
        return others + sum(
            entry.sequences
            for start, _, entry in self._deadlines.get(level, ())
            if entry.rank > priority or (entry.rank == priority and start <= start_by)
        )

    def fits(self, entry: Waiting, now: float, interval_s: float) -> bool:
        """Would it start in time, and everybody of its priority behind it still too?

        A slot of the level frees every `interval_s` seconds, of which higher priorities will take
        what they took lately, and other keys too as far as that is their share. Its turn is where
        its deadline puts it, or its key's turn if that is later. Lower priorities may be pushed
        back.
        """
        pace, key_pace = self._paces(entry, now, interval_s)
        for slots, interval in zip(self._before(entry), (pace, key_pace), strict=True):
            if now + interval * _late(slots + entry.sequences) > entry.start_by:
                return False
        passed = 0
        for start, _, other in self._deadlines.get(entry.level, ()):
            if other.rank < entry.priority:
                continue
            passed += other.sequences
            behind = other.rank == entry.priority and start > entry.start_by
            if behind and now + pace * _late(passed + entry.sequences) > start:
                return False
        return True

    def wait_s(self, entry: Waiting, now: float, interval_s: float) -> float:
        """How long a newcomer waits at most, nine times of ten, if it may come after everybody who
        has a deadline."""
        last = replace(entry, start_by=sys.float_info.max)
        turns = zip(self._before(last), self._paces(last, now, interval_s), strict=True)
        return max(interval * _late(slots + entry.sequences) for slots, interval in turns)

    def _before(self, entry: Waiting) -> tuple[int, int]:
        """Sequences that go before an entry: of all keys, and of higher priorities and its own."""
        higher = by_deadline = own = 0
        for start, _, other in self._deadlines.get(entry.level, ()):
            if other.rank > entry.priority:
                higher += other.sequences
            elif other.rank == entry.priority and start <= entry.start_by:
                by_deadline += other.sequences
                own += other.sequences if other.key == entry.key else 0
        return higher + by_deadline, higher + own

    def _paces(self, entry: Waiting, now: float, interval_s: float) -> tuple[float, float]:
        """Seconds between the slots that higher priorities will leave, and between those that
        other keys will leave to the entry's."""
        rates = self._rates.get(entry.level)
        taken = 1.0 / SHARE if self._unpromised else 0.0
        shared = 0.0
        if rates is not None:
            taken += interval_s * rates.above(entry.priority, now)
            rate, keys = rates.others(entry.key, now)
            shared = min(interval_s * rate, keys / (keys + 1.0))
        pace = interval_s / max(_LEAST_LEFT, 1.0 - taken)
        return pace, pace / (1.0 - shared)

    def push(self, entry: Waiting, now: float) -> None:
        """Let a request wait; one that waited at another level keeps its age.

        Raises:
            QueueFull: in all, for this key, or for requests without a deadline.
        """
        if self._size >= self._most:
            raise QueueFull(f"{self._most} requests wait already")
        if self._keys.get(entry.key, 0) >= self._most_per_key:
            raise QueueFull(f"{self._most_per_key} requests of this API key wait already")
        if not entry.promised and self._unpromised >= self._most_unpromised:
            raise QueueFull(f"{self._most_unpromised} requests without a deadline wait already")
        if entry.number < 0:  # else it comes from another level's lane and keeps what it gained
            entry.number, entry.rank, entry.since = next(self._numbers), entry.priority, now
        entry.queued = True
        self._lanes.setdefault((entry.level, entry.promised), _Lane()).push(entry)
        self._size += 1
        self._priorities[entry.priority] += 1
        if entry.key not in self._keys:
            self._come_back(entry.key)
        self._keys[entry.key] += 1
        if entry.promised:
            place = (entry.start_by, entry.number, entry)
            insort(self._deadlines.setdefault(entry.level, []), place)
            heapq.heappush(self._expiry, place)
        else:
            self._unpromised += 1

    def head(self, level: str, now: float) -> Waiting | None:
        """Who has to get the next free slots of a level; stays in the queue."""
        waiting, others = self._lanes.get((level, True)), self._lanes.get((level, False))
        if others is not None and others.size and (self.due(now) or not (waiting and waiting.size)):
            return others.head(now, self._held)
        return None if waiting is None else waiting.head(now, self._held)

    def due(self, now: float) -> bool:
        """Is it the turn of a request without a deadline, whatever others were promised?"""
        if not self._unpromised:
            return False
        if self._starts >= SHARE - 1:
            return True
        if now - self._last < PATIENCE_S:
            return False
        heads = (lane.oldest() for (_, promised), lane in self._lanes.items() if not promised)
        return any(entry is not None and now - entry.arrived >= PATIENCE_S for entry in heads)

    def started(self, entry: Waiting, now: float) -> None:
        """A request got its slots at once, without waiting."""
        if entry.promised:
            self._rates.setdefault(entry.level, _Rates()).took(entry, now)

    def start(self, entry: Waiting, now: float) -> None:
        """It got its slots: it leaves, and its key has had that much."""
        self.started(entry, now)
        self._held[entry.key] = self._held.get(entry.key, 0.0) + entry.hold_s * entry.sequences
        self.remove(entry)
        if entry.promised:
            self._starts += 1
        else:
            self._starts, self._last = 0, now

    def remove(self, entry: Waiting) -> None:
        """It leaves without having been served; gone already: nothing happens."""
        if not entry.queued:
            return
        entry.queued = False
        self._lanes[entry.level, entry.promised].drop(entry)
        self._size -= 1
        self._priorities[entry.priority] -= 1
        self._keys[entry.key] -= 1
        if not self._keys[entry.key]:
            del self._keys[entry.key]
        if not self._size:
            self._held.clear()  # nobody is left to be compared with
        if entry.promised:
            self._deadlines[entry.level].remove((entry.start_by, entry.number, entry))
        else:
            self._unpromised -= 1

    def expired(self, now: float) -> list[Waiting]:
        """Those that can no longer start in time; they leave."""
        late = []
        while self._expiry and (not self._expiry[0][2].queued or self._expiry[0][0] < now):
            entry = heapq.heappop(self._expiry)[2]
            if entry.queued:
                self.remove(entry)
                late.append(entry)
        return late

    def _come_back(self, key: str) -> None:
        """A key that was away keeps what it had, but has no credit from that time."""
        if len(self._held) >= _MOST_KEYS:
            self._held = {name: self._held[name] for name in self._keys}
        least = min((self._held[name] for name in self._keys), default=0.0)
        self._held[key] = max(least, self._held.get(key, 0.0))

    @property
    def next_expiry(self) -> float:
        """When `expired` will next have something to say; inf: never."""
        while self._expiry and not self._expiry[0][2].queued:
            heapq.heappop(self._expiry)
        return self._expiry[0][0] if self._expiry else math.inf
