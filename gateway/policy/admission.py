"""Who may come in: bounds on requests in the house, in all and per API key.

Counts only; queues nothing. A refused caller is told when a place is likely to be free.
Owned by the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from gateway.config import Limits
from gateway.errors import Overloaded

ANONYMOUS: Final = ""
RETRY_SECONDS: Final = (1.0, 60.0)
_WEIGHT: Final = 0.1  # of the newest stay in the running mean


class Admission:
    """Permits for requests. Keys that hold none take no memory."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
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

    def _take(self, key: str) -> float:
        limits, mine = self._limits, self._held.get(key, 0)
        if self._in_flight >= limits.max_concurrent:
            raise self._refusal("the gateway serves", limits.max_concurrent, self._in_flight)
        if mine >= limits.max_concurrent_per_key:
            raise self._refusal("this API key has", limits.max_concurrent_per_key, mine)
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
