"""What happened lately: which level a kind of request got, how many requests come, what was loaded.

Memory without a clock or I/O, bounded; `admission` feeds it and asks it. Owned by the event loop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

STAY_S: Final = 10.0  # a level that a kind of request got so long ago binds nobody
SETTLE_S: Final = 5.0  # a load is given so long to be of use before another level takes its place
HORIZON_S: Final = 600.0  # what is built or loaded has to pay within that
_TRUST_S: Final = 60.0  # of watching, until traffic counts as much as what the policy says
_MEMORY_S: Final = 600.0  # traffic older than that fades
_MOST: Final = 1024  # kinds of requests, and policies, that are remembered


@dataclass(slots=True)
class _Traffic:
    since: float
    at: float
    count: float = 0.0

    def fade(self, now: float) -> None:
        if now > self.at:
            self.count *= math.exp((self.at - now) / _MEMORY_S)
            self.at = now


class Recent:
    """Of one model."""

    def __init__(self) -> None:
        self._levels: OrderedDict[Hashable, tuple[str, float]] = OrderedDict()
        self._traffic: OrderedDict[str, _Traffic] = OrderedDict()
        self._loaded = -math.inf

    def came(self, policy: str, now: float) -> None:
        """A request of a policy came in."""
        traffic = self._traffic.get(policy)
        if traffic is None:
            traffic = self._traffic[policy] = _Traffic(now, now)
            if len(self._traffic) > _MOST:
                self._traffic.popitem(last=False)
        traffic.fade(now)
        traffic.count += 1.0
        self._traffic.move_to_end(policy)

    def expected(self, policy: str, stated: float, now: float) -> float:
        """Requests to expect within `HORIZON_S`: `stated` by the policy at first, then more and
        more what comes (the mean of a gamma-Poisson estimate). A policy that states 0 wants none
        counted."""
        traffic = self._traffic.get(policy)
        if traffic is None or not stated:
            return stated
        traffic.fade(now)
        watched = _MEMORY_S * -math.expm1((traffic.since - now) / _MEMORY_S)
        prior = stated * _TRUST_S / HORIZON_S
        return HORIZON_S * (prior + traffic.count) / (_TRUST_S + watched)

    def chose(self, kind: Hashable, level: str, now: float) -> None:
        """A kind of request got a level."""
        self._levels[kind] = (level, now)
        self._levels.move_to_end(kind)
        if len(self._levels) > _MOST:
            self._levels.popitem(last=False)

    def level(self, kind: Hashable, now: float) -> str | None:
        """What that kind got a moment ago."""
        level, at = self._levels.get(kind, (None, -math.inf))
        return level if now - at <= STAY_S else None

    def loads(self, now: float) -> None:
        """A level is being loaded for a request."""
        self._loaded = now

    def settling(self, now: float) -> bool:
        return now - self._loaded <= SETTLE_S
