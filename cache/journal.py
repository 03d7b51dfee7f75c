"""A journal of small entries that any replica can read for a while: on this disk and in Redis.

In Redis, entries lie in one hash per minute of their ids; when the hashes take more than a byte
budget, the oldest minute goes. Redis absent, slow or full costs only what is shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from cache.errors import CacheError
from cache.journal_disk import Entry, JournalFile
from cache.link import RedisAway
from cache.redis import RedisStore
from cache.stamps import first_stamp, stamped_at
from cache.threads import in_thread

_MINUTE: Final = 60.0
_DIGEST: Final = 64  # hex digits before an entry's data
_BATCH: Final = 256  # entries to one call of Redis

# KEYS: index (sorted set of minutes), sizes (hash), then the hash of each minute.
# ARGV: budget, seconds to live, oldest minute, prefix of minute keys, then for each minute its
# name, the number of pairs, and the pairs of field and value.
_ADD: Final = """
local budget, ttl, oldest, prefix = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local at = 5
for key = 3, #KEYS do
  local minute, pairs_left, added = ARGV[at], tonumber(ARGV[at + 1]), 0
  at = at + 2
  for _ = 1, pairs_left do
    local field, value = ARGV[at], ARGV[at + 1]
    at = at + 2
    if redis.call('HSETNX', KEYS[key], field, value) == 1 then added = added + #field + #value end
  end
  redis.call('EXPIRE', KEYS[key], ttl)
  redis.call('ZADD', KEYS[1], minute, minute)
  redis.call('HINCRBY', KEYS[2], minute, added)
end
local function drop(minute)
  redis.call('UNLINK', prefix .. minute)
  redis.call('ZREM', KEYS[1], minute)
  redis.call('HDEL', KEYS[2], minute)
end
for _, minute in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. oldest)) do
  drop(minute)
end
local total = 0
for _, size in ipairs(redis.call('HVALS', KEYS[2])) do total = total + tonumber(size) end
while total > budget do
  local minute = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
  if not minute then break end
  total = total - tonumber(redis.call('HGET', KEYS[2], minute) or 0)
  drop(minute)
end
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('EXPIRE', KEYS[2], ttl)
return total
"""


class Journal:
    """Entries with ids of one prefix (`cache.stamps`), each for `ttl` seconds at most.

    For one event loop.

    Args:
        path: the file on disk.
        budget, redis_budget: bytes there and in Redis.
        clock: Unix seconds.
    """

    def __init__(
        self,
        path: Path,
        *,
        prefix: str,
        ttl: float,
        budget: int,
        redis: RedisStore | None = None,
        redis_budget: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Raises:
            CacheError: the file can neither be read nor made anew.
        """
        self._file = JournalFile(path, budget=budget)
        self._prefix = prefix
        self._ttl = ttl
        self._redis = redis if redis_budget > 0 else None
        self._redis_budget = redis_budget
        self._clock = clock

    async def write(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """Keep entries. Returns how many could not be kept on disk, and in Redis."""
        if not entries:
            return 0, 0
        lost = 0
        oldest = first_stamp(self._prefix, self._clock() - self._ttl)
        try:
            await in_thread(self._file.write, entries, oldest=oldest)
        except CacheError:
            lost = len(entries)
        unshared = 0
        for start in range(0, len(entries), _BATCH):
            batch = entries[start : start + _BATCH]
            if self._redis is not None and not await self._share(self._redis, batch):
                unshared += len(batch)
        return lost, unshared

    async def read(self, name: str) -> Entry | None:
        """An entry of this or another replica; None when it is unknown or older than `ttl`."""
        at = stamped_at(self._prefix, name)
        if at is None or at < self._clock() - self._ttl:
            return None
        with suppress(CacheError):
            found = await in_thread(self._file.read, name)
            if found is not None:
                return found
        if self._redis is not None:
            with suppress(RedisAway):
                return await self._fetch(self._redis, name, at)
        return None

    async def close(self) -> None:
        """Close the file. Does not close Redis."""
        await in_thread(self._file.close)

    async def _share(self, redis: RedisStore, entries: Sequence[Entry]) -> bool:
        minutes: dict[int, dict[str, bytes]] = {}
        for entry in entries:
            at = stamped_at(self._prefix, entry.id)
            fields = minutes.setdefault(int((at or 0.0) // _MINUTE), {})
            fields[entry.id] = entry.digest.encode() + entry.data
            fields[entry.digest] = entry.shared
        keys = [self._key(redis, "index"), self._key(redis, "sizes")]
        oldest = int((self._clock() - self._ttl) // _MINUTE)
        arguments: list[object] = [
            self._redis_budget, int(self._ttl + 2 * _MINUTE), oldest, self._key(redis, ""),
        ]  # fmt: skip
        for minute, fields in minutes.items():
            keys.append(self._key(redis, str(minute)))
            arguments += [minute, len(fields)]
            arguments += [part for pair in fields.items() for part in pair]
        try:
            await redis.link.command("EVAL", _ADD, len(keys), *keys, *arguments)
        except RedisAway:
            return False
        return True

    async def _fetch(self, redis: RedisStore, name: str, at: float) -> Entry | None:
        key = self._key(redis, str(int(at // _MINUTE)))
        value = await redis.link.command("HGET", key, name)
        if value is None:
            return None
        digest = value[:_DIGEST].decode("ascii", "replace")
        shared = await redis.link.command("HGET", key, digest)
        return None if shared is None else Entry(name, value[_DIGEST:], digest, shared)

    def _key(self, redis: RedisStore, what: str) -> str:
        return f"{redis.prefix}journal:{self._prefix}:{what}"
