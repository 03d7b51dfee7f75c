"""What levels in memory are worth, and which of them leave when another needs their room. Pure.

A level is kept because somebody will ask for it again and would then wait for its load, so what it
is expected to save is (how often it is asked for) × (seconds to load it again). Room is taken where
the least is lost for it: the weighted-caching rule of GreedyDual-Size (Cao & Irani, 1997), with
a forgotten count of requests in place of its clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Final

HALF_LIFE_S: Final = 600.0  # a request counts half after ten minutes
_DECAY: Final = math.log(2) / HALF_LIFE_S


class Demand:
    """How often something is asked for: a count that forgets by half every `HALF_LIFE_S`."""

    __slots__ = ("_at", "_count")

    def __init__(self) -> None:
        self._count = 0.0
        self._at = 0.0

    def count(self, now: float) -> None:
        """One request at `now` (seconds of any steady clock)."""
        self._count = self._left(now) + 1.0
        self._at = now

    def per_second(self, now: float) -> float:
        """Requests per second to expect."""
        return self._left(now) * _DECAY

    def _left(self, now: float) -> float:
        return self._count * math.exp(-_DECAY * max(0.0, now - self._at))


@dataclass(frozen=True, slots=True)
class Holding:
    """One level in memory.

    Attributes:
        place: levels with the same place live in the same bytes: the smaller ones' are among the
            largest's.
        bytes: resident bytes of its weights.
        rate: requests per second expected.
        reload_s: seconds to load it again.
        last_used: of equals, the one used longest ago leaves first.
        kept: why it must stay (`in use`, `pinned`, …); empty when it may leave.
    """

    name: str
    place: str
    bytes: int
    rate: float
    reload_s: float
    last_used: float
    kept: str = ""

    @property
    def value(self) -> float:
        """Seconds of waiting that keeping it saves, per second."""
        return self.rate * self.reload_s


@dataclass(frozen=True, slots=True)
class Parting:
    """Levels of one place that would leave together.

    Attributes:
        freed: bytes that leave with them.
        lost: expected seconds of waiting per second, without them.
    """

    levels: tuple[Holding, ...]
    freed: int
    lost: float

    @property
    def order(self) -> tuple[float, float]:
        """The least lost per byte first; of equals, what was used longest ago."""
        return self.lost / self.freed, max(holding.last_used for holding in self.levels)


def occupied(sizes: Iterable[tuple[str, int]]) -> int:
    """Bytes that levels take together; `sizes`: (place, bytes) of each."""
    most: dict[str, int] = {}
    for place, size in sizes:
        most[place] = max(most.get(place, 0), size)
    return sum(most.values())


def partings(holdings: Iterable[Holding]) -> list[Parting]:
    """Every way to free bytes at one place, cheapest byte first.

    Of a shared place the largest levels leave first: the bytes of a smaller one stay as long as
    a larger one is there.
    """
    ordered = sorted(holdings, key=lambda held: (held.place, -held.bytes, held.name))
    ways: list[Parting] = []
    for _, place in groupby(ordered, key=attrgetter("place")):
        ways += _of_place(list(place))
    return sorted(ways, key=attrgetter("order"))


def leaving(holdings: Sequence[Holding], need: int) -> tuple[Holding, ...] | None:
    """The levels to unload for `need` bytes, losing little; None when all that may leave is not
    enough. The first to leave stands first.

    Going from the cheapest byte to the dearest, whatever would free enough together with what was
    taken so far is a candidate and is passed over, everything else is taken; the candidate that
    loses least wins. Minimum knapsack's greedy rule (Csirik, Frenk, Labbé, Zhang, 1991): at most
    twice the least possible loss when no place is shared.
    """
    if need <= 0:
        return ()
    taken: dict[str, Parting] = {}
    best: tuple[float, tuple[Parting, ...]] | None = None
    for way in partings(holdings):
        place = way.levels[0].place
        if place in taken and taken[place].freed >= way.freed:
            continue
        together = {**taken, place: way}
        if sum(one.freed for one in together.values()) < need:
            taken = together
            continue
        chosen = _spared(together, need)
        lost = sum(one.lost for one in chosen)
        if best is None or lost < best[0]:
            best = lost, chosen
    if best is None:
        return None
    return tuple(holding for way in best[1] for holding in way.levels)


def _spared(ways: Mapping[str, Parting], need: int) -> tuple[Parting, ...]:
    """Those of `ways` that are needed, the dearest being spared first; cheapest byte first."""
    left = dict(ways)
    freed = sum(way.freed for way in ways.values())
    for place, way in sorted(ways.items(), key=lambda item: -item[1].lost):
        if freed - way.freed >= need:
            freed -= way.freed
            del left[place]
    return tuple(sorted(left.values(), key=attrgetter("order")))


def _of_place(holdings: list[Holding]) -> Iterator[Parting]:
    """`holdings`: largest first."""
    for count, holding in enumerate(holdings, start=1):
        if holding.kept:
            return
        rest = holdings[count].bytes if count < len(holdings) else 0
        gone = tuple(holdings[:count])
        freed = holdings[0].bytes - rest
        if freed:
            yield Parting(gone, freed, sum(one.value for one in gone))
