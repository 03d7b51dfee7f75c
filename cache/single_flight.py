"""One build over all replicas: whoever asks for work that is under way gets its result.

In the process, callers join one task. Between processes and hosts, the holder of a lock works and
the others look whether the result has appeared. Every call of `run` ends in exactly one of:
(1) the result was there; (2) this process claimed the key and did the work; (3) another process did
and `done` found the result; (4) the work failed here, and its error is raised to all who joined.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from cache.errors import ClaimLost
from cache.lock import Claim, Locks
from cache.redis import RedisStore

T = TypeVar("T")
log = logging.getLogger(__name__)

LOCK_SECONDS = 15.0
_FIRST_POLL_SECONDS = 0.05
_LAST_POLL_SECONDS = 1.0


class SingleFlight:
    """For one event loop.

    Args:
        redis: where replicas on other hosts are met; None for this host only.
        root: the cache's folder, where processes of this host meet; None for this process only.
        ttl: seconds after which the lock of a dead leader is free (at once for its file lock).
    """

    def __init__(
        self, redis: RedisStore | None, root: Path | None = None, *, ttl: float = LOCK_SECONDS
    ) -> None:
        self._locks = Locks(redis, root / "locks" if root is not None else None, ttl)
        self._flights: dict[str, asyncio.Task[Any]] = {}
        self._woken = asyncio.Event()

    async def run(
        self,
        key: str,
        work: Callable[[Claim], Awaitable[T]],
        done: Callable[[], Awaitable[T | None]],
    ) -> T:
        """The result of `key`, made at most once at a time over all replicas.

        Args:
            work: makes and publishes the result. It must ask `claim.check()` (or give
                `claim.still_valid` to the publisher) right before publishing; when the claim was
                lost its result is dropped and the new leader's is awaited.
            done: the published result, or None while there is none.

        A cancelled caller leaves the others and the work alone; the work goes on even when all
        callers have left.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._lead_or_follow(key, work, done))
            self._flights[key] = flight
            flight.add_done_callback(lambda task: self._landed(key, task))
        result: T = await asyncio.shield(flight)
        return result

    def running(self) -> list[str]:
        """Keys under way in this process, sorted."""
        return sorted(self._flights)

    async def close(self) -> None:
        """Cancel what is under way; its locks are released."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _lead_or_follow(
        self,
        key: str,
        work: Callable[[Claim], Awaitable[T]],
        done: Callable[[], Awaitable[T | None]],
    ) -> T:
        stop = self._locks.listen(lambda _message: self._woken.set())
        pause = _FIRST_POLL_SECONDS
        try:
            while True:
                found = await done()
                if found is not None:
                    return found
                claim = await self._locks.claim(key)
                if claim is not None:
                    made = await self._lead(claim, work, done)
                    if made is not None:
                        return made[0]
                await self._wait(pause)
                pause = min(pause * 1.5, _LAST_POLL_SECONDS)
        finally:
            stop()

    async def _lead(
        self,
        claim: Claim,
        work: Callable[[Claim], Awaitable[T]],
        done: Callable[[], Awaitable[T | None]],
    ) -> tuple[T] | None:
        """Do the work under `claim`; None when the claim was lost on the way."""
        try:
            found = await done()  # the last holder may have finished just before we got the lock
            if found is not None:
                return (found,)
            made = await work(claim)
            if await claim.confirm():
                return (made,)
        except ClaimLost:
            pass  # the new holder's result is the one to use
        finally:
            await asyncio.shield(claim.release())
        log.warning("%s: another builder took over; waiting for it", claim.key)
        return None

    async def _wait(self, seconds: float) -> None:
        """Until some lock was released or the time is over."""
        self._woken.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return

    def _landed(self, key: str, flight: asyncio.Task[Any]) -> None:
        del self._flights[key]
        if not flight.cancelled() and flight.exception() is not None:
            log.debug("%s failed: %r", key, flight.exception())
