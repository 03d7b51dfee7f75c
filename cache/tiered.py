"""Both tiers as one store: disk first, Redis for what other hosts have made.

Blocking disk work runs in threads. Without Redis it is the disk tier alone, through the same calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from cache.artifact import Artifact
from cache.disk import DiskStore, DiskUsage
from cache.errors import CacheError
from cache.keys import check_key
from cache.manifest import Manifest
from cache.redis import RedisStore, RedisUsage
from cache.threads import in_thread

log = logging.getLogger(__name__)

Tier = Literal["disk", "redis", "miss"]
MAX_SHARING = 64  # artifacts waiting to be copied into Redis


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Both tiers; `redis` None when none is configured."""

    disk: DiskUsage
    redis: RedisUsage | None


class ArtifactStore:
    """The artifacts this process can reach.

    Args:
        on_hit: told where each `fetch` found what it looked for.
    """

    def __init__(
        self,
        disk: DiskStore,
        redis: RedisStore | None = None,
        *,
        on_hit: Callable[[Tier], None] = lambda _tier: None,
    ) -> None:
        self.disk = disk
        self.redis = redis
        self._on_hit = on_hit
        self._fetching: dict[str, asyncio.Task[bool]] = {}
        self._to_share: dict[str, None] = {}  # an ordered set
        self._sharer: asyncio.Task[None] | None = None

    async def fetch(self, key: str) -> Artifact | None:
        """Open an artifact, copying it from Redis to disk if need be. None: it has to be built.

        What is damaged in a tier is taken out of it and counts as absent there.

        Raises:
            CacheError: the disk cannot be read or has no room for what Redis holds.
        """
        check_key(key)
        artifact = await in_thread(self.disk.read, key)
        tier: Tier = "disk"
        if artifact is None and self.redis is not None and await self._copy(key):
            artifact = await in_thread(self.disk.read, key)
            tier = "redis"
        self._on_hit(tier if artifact is not None else "miss")
        if artifact is not None:
            await in_thread(self.disk.touch, key)
        return artifact

    async def manifest(self, key: str) -> Manifest | None:
        """The manifest alone, from the nearest tier that has it."""
        found = await in_thread(self.disk.manifest, key)
        if found is None and self.redis is not None:
            found = await self.redis.manifest(key)
        return found

    async def share(self, key: str) -> None:
        """Copy an artifact from disk to Redis, later, one at a time; returns at once.

        Failing to is no error: the artifact is on disk.
        """
        if self.redis is None:
            return
        if len(self._to_share) >= MAX_SHARING:
            log.warning("artifact %s is not shared: %d are waiting already", key, MAX_SHARING)
            return
        self._to_share[check_key(key)] = None
        if self._sharer is None or self._sharer.done():
            self._sharer = asyncio.create_task(self._share_all(self.redis))

    async def shared(self) -> None:
        """Wait until everything given to `share` was tried."""
        if self._sharer is not None:
            await asyncio.wait([self._sharer])

    async def delete(self, key: str) -> bool:
        """Remove an artifact from both tiers. False when neither had it."""
        check_key(key)
        self._to_share.pop(key, None)
        on_disk = await in_thread(self.disk.delete, key)
        in_redis = self.redis is not None and await self.redis.delete(key)
        return on_disk or in_redis

    async def keys(self) -> list[str]:
        """Keys of all artifacts in either tier, sorted."""
        found = set(await in_thread(self.disk.keys))
        if self.redis is not None:
            found |= set(await self.redis.keys())
        return sorted(found)

    async def usage(self) -> StoreUsage:
        """Bytes held by both tiers."""
        redis = await self.redis.usage() if self.redis is not None else None
        return StoreUsage(await in_thread(self.disk.usage), redis)

    async def close(self) -> None:
        """Stop sharing and fetching. Does not close the tiers."""
        tasks = [*self._fetching.values(), *([self._sharer] if self._sharer else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _copy(self, key: str) -> bool:
        """Redis → disk, once for all who ask at the same time; it goes on when they leave."""
        task = self._fetching.get(key)
        if task is None:
            assert self.redis is not None
            task = asyncio.create_task(self.redis.fetch(key, self.disk))
            self._fetching[key] = task
            task.add_done_callback(lambda done: self._copied(key, done))
        return await asyncio.shield(task)

    def _copied(self, key: str, task: asyncio.Task[bool]) -> None:
        del self._fetching[key]
        if not task.cancelled():
            task.exception()  # those who still wait get it; nobody need be left

    async def _share_all(self, redis: RedisStore) -> None:
        while self._to_share:
            key = next(iter(self._to_share))
            try:
                artifact = await in_thread(self.disk.read, key)
                if artifact is not None:
                    with artifact:
                        await redis.share(artifact)
            except (CacheError, OSError) as error:
                log.warning("artifact %s is not shared: %s", key, error)
            finally:
                with suppress(KeyError):
                    del self._to_share[key]
