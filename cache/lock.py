"""One holder per key: a file lock on this host, a Redis lock with a fencing token over all hosts.

The Redis lock lives `ttl` seconds past its holder's last heartbeat. A holder is told as soon as it
is known to have lost it. When Redis goes away the file lock alone remains; when Redis comes back
the holder takes its place there again unless someone newer has been.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from filelock import BaseFileLock, FileLock, Timeout

from cache.errors import ClaimLost
from cache.files import clear_errors
from cache.link import RedisAway
from cache.redis import RedisStore

log = logging.getLogger(__name__)

CHANNEL = "released"
_FENCE_TTL_MS = 7 * 86_400_000

# Tokens only grow, also over a Redis that lost its data: none is below the server's clock (ms).
_ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local clock = redis.call('TIME')
local token = clock[1] * 1000 + math.floor(clock[2] / 1000)
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if last >= token then token = last + 1 end
local text = string.format('%.0f', token)
redis.call('SET', KEYS[2], text, 'PX', ARGV[3])
redis.call('SET', KEYS[1], text .. ':' .. ARGV[1], 'PX', ARGV[2])
return token
"""
# A lock of the same owner under another token is ours: its answer was lost on the way.
_RENEW = """
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, -string.len(ARGV[5])) ~= ARGV[5] then return 0 end
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if not held and last > tonumber(ARGV[2]) then return 0 end
if last < tonumber(ARGV[2]) then last = tonumber(ARGV[2]) end
redis.call('SET', KEYS[2], string.format('%.0f', last), 'PX', ARGV[4])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return 1
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1
"""


@dataclass(frozen=True, slots=True)
class _Names:
    lock: str
    fence: str


class Claim:
    """The right to do the work of one key, until released or lost.

    Attributes:
        token: fencing token, greater than that of every earlier holder of the key.
    """

    def __init__(self, locks: Locks, key: str, token: int, file: BaseFileLock | None) -> None:
        self.key = key
        self.token = token
        self.value = f"{token}:{locks.owner}"
        self._locks = locks
        self._file = file
        self._lost = False
        self._renewed = time.monotonic()
        self._heart = asyncio.create_task(self._beat())

    def still_valid(self) -> bool:
        """Nobody else can have taken over. Callable from any thread; asks nobody.

        Also False when this process stood still for so long that its heartbeats did not go out in
        time; `confirm` may find that the lock is still ours.
        """
        return not self._lost and (
            not self._locks.expires or time.monotonic() - self._renewed < self._locks.ttl
        )

    async def confirm(self) -> bool:
        """Ask Redis now. True also when Redis cannot be asked: then the host's lock decides."""
        if not self._lost:
            with suppress(RedisAway):
                self._lost = not await self._locks.renew(self)
            self._renewed = time.monotonic()
        return not self._lost

    async def check(self) -> None:
        """Raises `ClaimLost` unless confirmed; call it right before publishing."""
        if not await self.confirm():
            raise ClaimLost(f"{self.key}: another builder took over")

    async def release(self) -> None:
        """Let others in. Idempotent; releases only what is still ours."""
        self._heart.cancel()
        with suppress(asyncio.CancelledError):
            await self._heart
        try:
            with suppress(RedisAway):
                await self._locks.free(self)
        finally:
            self._lost = True
            if self._file is not None:
                self._file.release()

    async def _beat(self) -> None:
        while not self._lost:
            await asyncio.sleep(self._locks.ttl / 3)
            await self.confirm()
        log.warning("lost the lock of %s", self.key)


class Locks:
    """Takes claims.

    Args:
        root: folder for the host's lock files, or None.
        ttl: seconds a Redis lock outlives its holder's last heartbeat.
    """

    def __init__(self, redis: RedisStore | None, root: Path | None, ttl: float) -> None:
        self.owner = uuid.uuid4().hex
        self.ttl = ttl
        self.expires = redis is not None
        self._redis = redis
        self._root = root

    async def claim(self, key: str) -> Claim | None:
        """Take the lock of `key` if it is free, on this host and in Redis when that is up."""
        file = self._lock_file(key)
        if file is None and self._root is not None:
            return None
        token: int | None = None
        try:
            token = await self._acquire(key)
        except RedisAway:
            token = time.time_ns() // 1_000_000
        finally:
            if not token and file is not None:
                file.release()
        return Claim(self, key, token, file) if token else None

    async def renew(self, claim: Claim) -> bool:
        """Prolong a claim in Redis. False when it is someone else's. Raises `RedisAway`."""
        if self._redis is None:
            return True
        names = self._names(claim.key)
        return bool(
            await self._redis.link.command(
                "EVAL", _RENEW, 2, names.lock, names.fence,
                claim.value, claim.token, int(self.ttl * 1000), _FENCE_TTL_MS, self.owner,
            )
        )  # fmt: skip

    async def free(self, claim: Claim) -> None:
        """Delete the Redis lock if it is still the claim's, and tell those who wait."""
        if self._redis is not None:
            channel = self._redis.bus.channel(CHANNEL)
            await self._redis.link.command(
                "EVAL", _RELEASE, 1, self._names(claim.key).lock, claim.value, channel, claim.key
            )

    def listen(self, wake: Callable[[bytes | None], None]) -> Callable[[], None]:
        """Call `wake` when some key was released (None: perhaps); returns what ends it."""
        if self._redis is None:
            return lambda: None

        async def heard(message: bytes | None) -> None:
            wake(message)

        return self._redis.bus.listen(CHANNEL, heard)

    async def _acquire(self, key: str) -> int:
        """A token, or 0 when the lock is taken."""
        if self._redis is None:
            raise RedisAway("none configured")
        names = self._names(key)
        answer = await self._redis.link.command(
            "EVAL", _ACQUIRE, 2, names.lock, names.fence,
            self.owner, int(self.ttl * 1000), _FENCE_TTL_MS,
        )  # fmt: skip
        return int(answer)

    def _lock_file(self, key: str) -> FileLock | None:
        if self._root is None:
            return None
        with clear_errors(f"cannot lock {key}"):
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(self._root / _short(key), thread_local=False)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                return None
        return lock

    def _names(self, key: str) -> _Names:
        assert self._redis is not None
        short = _short(key)
        return _Names(f"{self._redis.prefix}lock:{short}", f"{self._redis.prefix}fence:{short}")


def _short(key: str) -> str:
    """Any key as a name of fixed length that is safe in paths and in Redis."""
    return blake3(key.encode()).hexdigest(length=16)
