"""The Redis tier: artifacts for hosts that do not have them on disk.

A blob lies there in chunks, named by its digest and shared by all manifests that name it. A
manifest becomes visible in one script that first makes sure that all its chunks are there. Bytes
are proven on the way to disk. Whatever Redis does (absent, slow, full, restarted, half-emptied),
the methods here return "not there" or "not stored" and never an error of Redis.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cache.artifact import Artifact
from cache.bus import Bus
from cache.chunks import CHUNK_BYTES, Chunk, DamagedBlob, batches, chunks_of, receive
from cache.disk import DiskStore, Event, EventFn
from cache.errors import CorruptArtifact
from cache.eviction import Candidate, choose_victims
from cache.keys import check_key
from cache.link import RedisAway, RedisLink, RedisRefused
from cache.manifest import Manifest
from cache.threads import in_thread
from cache.uses import Use, parse_use

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 600  # chunks whose manifest never came go after this

_PUBLISH = """
for i = 3, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return 0 end
end
for i = 3, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class RedisUsage:
    """What lies in Redis now; `up` False means unknown, and zeros elsewhere."""

    up: bool
    artifacts: int
    blob_bytes: int
    budget: int


class RedisStore:
    """Artifacts in Redis under a byte budget, and the link other parts of the cache share.

    For one event loop; made inside it. Two replicas that share at the same moment may exceed the
    budget by one artifact until the next share, and an eviction may take a chunk that another
    replica counted on: its readers then see a miss and the artifact is shared again.

    Args:
        budget: bytes of blobs; manifests come on top.
        ttl: seconds after its last use when an artifact goes.
        variant_limit: larger artifacts stay on disk only.
        timeout: seconds for any single call.
        prefix: of every key, so that several installations may share a server.
        on_state: told when Redis becomes usable or stops being so.
        on_event: told of evictions and corruptions in this tier.
    """

    def __init__(
        self,
        url: str,
        *,
        budget: int,
        ttl: float,
        variant_limit: int,
        timeout: float = 2.0,
        prefix: str = "pressgate:",
        on_state: Callable[[bool], None] = lambda _up: None,
        on_event: EventFn = lambda _event, _what: None,
    ) -> None:
        self.link = RedisLink(url, timeout=timeout, on_state=on_state)
        self.bus = Bus(self.link, prefix)
        self.prefix = prefix
        self.budget = budget
        self.variant_limit = variant_limit
        self._ttl_ms = int(ttl * 1000)
        self._on_event = on_event
        self._index = f"{prefix}artifacts"
        self._uses = f"{prefix}uses"

    @property
    def up(self) -> bool:
        """Redis is usable now."""
        return self.link.up

    async def start(self) -> bool:
        """Make first contact, so that `up` is known. Not needed before other calls."""
        return await self.link.ping()

    async def close(self) -> None:
        await self.bus.close()
        await self.link.close()

    async def share(self, artifact: Artifact) -> bool:
        """Copy an artifact into Redis. False when it is too large, unwelcome, or Redis is away."""
        manifest = artifact.manifest
        data = manifest.to_json()
        if manifest.total_bytes > self.variant_limit or len(data) > self.variant_limit:
            return False
        try:
            return await self._share(artifact, data)
        except RedisAway as error:
            log.debug("artifact %s is not shared: %s", manifest.key, error)
            return False

    async def fetch(self, key: str, disk: DiskStore) -> bool:
        """Copy an artifact from Redis to `disk`, proving every blob. False when it is not there.

        Raises:
            CacheFull, CacheError: the disk cannot take it.
        """
        try:
            manifest = await self._manifest(key)
            if manifest is None:
                return False
            try:
                await receive(self.link, self._chunk_key, manifest, disk)
            except DamagedBlob as damage:
                await self._drop(manifest, damage)
                return False
            with suppress(RedisAway):
                await self._refresh(manifest)
            return True
        except RedisAway:
            return False

    async def manifest(self, key: str) -> Manifest | None:
        """The manifest alone; None when it is not there or Redis is away."""
        with suppress(RedisAway):
            return await self._manifest(key)
        return None

    async def keys(self) -> list[str]:
        """Keys of all artifacts there, sorted; empty when Redis is away."""
        with suppress(RedisAway):
            return sorted([candidate.key for candidate in await self._candidates(())])
        return []

    async def delete(self, key: str) -> bool:
        """Remove an artifact and the blobs only it has. False when absent or Redis is away."""
        with suppress(RedisAway):
            if await self.link.command("EXISTS", self._manifest_key(key)):
                await self._remove([key], await self._candidates(()))
                return True
        return False

    async def usage(self) -> RedisUsage:
        """What lies there now."""
        with suppress(RedisAway):
            candidates = await self._candidates(())
            blobs = {d: n for c in candidates for d, n in c.blobs.items()}
            return RedisUsage(True, len(candidates), sum(blobs.values()), self.budget)
        return RedisUsage(False, 0, 0, self.budget)

    async def _share(self, artifact: Artifact, data: bytes) -> bool:
        manifest = artifact.manifest
        absent = await self._absent(manifest)
        need = sum(manifest.blobs[digest] for digest in absent) + len(data)
        if not await self._make_room(need, keep=manifest):
            log.info("artifact %s is not shared: Redis has no room for it", manifest.key)
            return False
        views = {record.digest: artifact.tensor(n) for n, record in manifest.tensors.items()}
        todo = [chunk for digest in absent for chunk in chunks_of(digest, manifest.blobs[digest])]
        try:
            await self._upload(todo, views)
            return await self._publish(manifest, data)
        except RedisRefused as error:
            log.warning("artifact %s does not fit into Redis: %s", manifest.key, error)
            await self._unlink([self._chunk_key(chunk) for chunk in todo])
            return False

    async def _upload(self, chunks: Iterable[Chunk], views: dict[str, memoryview]) -> None:
        for batch in batches(chunks):

            async def send(client: Any, batch: Sequence[Chunk] = batch) -> None:
                pipeline = client.pipeline(transaction=False)
                for chunk in batch:
                    piece = views[chunk.digest][chunk.start : chunk.start + chunk.nbytes]
                    pipeline.execute_command(
                        "SET", self._chunk_key(chunk), piece, "EX", UPLOAD_SECONDS
                    )
                for answer in await pipeline.execute(raise_on_error=False):
                    if isinstance(answer, Exception):
                        raise answer

            await self.link.call(send)
        self.link.wrote()

    async def _publish(self, manifest: Manifest, data: bytes) -> bool:
        chunks = self._chunk_keys(manifest)
        keys = [self._manifest_key(manifest.key), self._index, *chunks]
        done = await self.link.command(
            "EVAL", _PUBLISH, len(keys), *keys, self._ttl_ms, data, time.time(), manifest.key
        )
        await self._count_use(manifest.key)
        return bool(done)

    async def _absent(self, manifest: Manifest) -> list[str]:
        """Digests of which not every chunk is there."""
        wanted = [
            (digest, [self._chunk_key(chunk) for chunk in chunks_of(digest, size)])
            for digest, size in manifest.blobs.items()
        ]

        async def ask(client: Any) -> list[int]:
            pipeline = client.pipeline(transaction=False)
            for _, names in wanted:
                pipeline.execute_command("EXISTS", *names)
            return list(await pipeline.execute())

        counts = await self.link.call(ask)
        return [d for (d, names), n in zip(wanted, counts, strict=True) if n < len(names)]

    async def _make_room(self, need: int, keep: Manifest) -> bool:
        """Have `need` bytes free in our budget and under the server's own limit; evict for it."""
        candidates = await self._candidates({keep.key})
        held = {d: n for c in candidates for d, n in c.blobs.items()}
        excess: float = need - min(self.budget - sum(held.values()), await self._server_room())
        if excess <= 0:
            return True
        # Blobs of the newcomer count as pinned: it is about to need them.
        newcomer = Candidate(key="", blobs=keep.blobs, pinned=True)
        victims = choose_victims([*candidates, newcomer], math.ceil(excess))
        if not victims:
            return False
        await self._remove(victims, [*candidates, newcomer])
        for key in victims:
            self._on_event(Event.EVICTION, key)
        return True

    async def _server_room(self) -> float:
        """Bytes below the server's `maxmemory`, less a sixteenth for its own needs."""
        answer = await self.link.command("INFO", "memory")
        limit, used = int(answer["maxmemory"]), int(answer["used_memory"])
        return limit - limit // 16 - used if limit else math.inf

    async def _remove(self, keys: Collection[str], candidates: Sequence[Candidate]) -> None:
        """Delete manifests first, then the chunks no other candidate names."""
        await self._unlink([self._manifest_key(key) for key in keys])
        await self.link.command("ZREM", self._index, *keys)
        await self.link.command("HDEL", self._uses, *keys)
        kept = {digest for c in candidates if c.key not in keys for digest in c.blobs}
        gone = {d: n for c in candidates if c.key in keys for d, n in c.blobs.items()}
        await self._unlink(
            [
                self._chunk_key(chunk)
                for digest, size in gone.items()
                if digest not in kept
                for chunk in chunks_of(digest, size)
            ]
        )

    async def _candidates(self, pinned: Collection[str]) -> list[Candidate]:
        """Everything there. Entries whose manifest has expired are taken off the index."""
        now = time.time()
        found: list[Candidate] = []
        expired: list[str] = []
        for name in await self.link.command("ZRANGE", self._index, 0, -1):
            key = name.decode()
            manifest = await self._manifest(key)
            if manifest is None:
                expired.append(key)
                continue
            use = parse_use(await self.link.command("HGET", self._uses, key))
            found.append(
                Candidate(
                    key=key,
                    blobs=manifest.blobs,
                    rebuild_seconds=manifest.build_seconds,
                    uses=use.now(now),
                    last_used=use.at,
                    pinned=key in pinned,
                )
            )
        if expired:
            await self.link.command("ZREM", self._index, *expired)
            await self.link.command("HDEL", self._uses, *expired)
        return found

    async def _manifest(self, key: str) -> Manifest | None:
        data = await self.link.command("GET", self._manifest_key(key))
        if data is None:
            return None
        try:
            manifest = await in_thread(Manifest.from_json, data)
            if manifest.key != key:
                raise CorruptArtifact(f"the manifest of {key} is that of {manifest.key}")
        except CorruptArtifact as error:
            log.warning("in Redis: %s", error)
            await self._unlink([self._manifest_key(key)])
            self._on_event(Event.CORRUPTION, key)
            return None
        return manifest

    async def _drop(self, manifest: Manifest, damage: DamagedBlob) -> None:
        """Remove a manifest and the one blob of it that cannot be used."""
        log.warning("in Redis: artifact %s: %s", manifest.key, damage)
        chunks = chunks_of(damage.digest, manifest.blobs[damage.digest])
        names = [self._chunk_key(chunk) for chunk in chunks]
        await self._unlink([self._manifest_key(manifest.key), *names])
        if not damage.missing:
            self._on_event(Event.CORRUPTION, manifest.key)

    async def _refresh(self, manifest: Manifest) -> None:
        """A use: count it and start the time to live anew."""
        names = [self._manifest_key(manifest.key), *self._chunk_keys(manifest)]

        async def expire(client: Any) -> None:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.execute_command("PEXPIRE", name, self._ttl_ms)
            pipeline.execute_command("ZADD", self._index, time.time(), manifest.key)
            await pipeline.execute()

        await self.link.call(expire)
        await self._count_use(manifest.key)

    async def _count_use(self, key: str) -> None:
        use: Use = parse_use(await self.link.command("HGET", self._uses, key))
        data = use.bumped(time.time()).model_dump_json()
        await self.link.command("HSET", self._uses, key, data)

    async def _unlink(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), 1000):
            await self.link.command("UNLINK", *names[start : start + 1000])

    def _manifest_key(self, key: str) -> str:
        return f"{self.prefix}manifest:{check_key(key)}"

    def _chunk_key(self, chunk: Chunk) -> str:
        return f"{self.prefix}blob:{chunk.digest}:{CHUNK_BYTES}:{chunk.index}"

    def _chunk_keys(self, manifest: Manifest) -> list[str]:
        return [
            self._chunk_key(chunk)
            for digest, size in manifest.blobs.items()
            for chunk in chunks_of(digest, size)
        ]
