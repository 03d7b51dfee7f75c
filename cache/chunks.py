"""Blobs in pieces: how they are cut, batched, and put together again on disk.

Small tensors travel many to a call, large ones in several calls; a call never moves more than about
one chunk, so that one artifact does not hold up everybody else's commands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from cache.disk import DiskStore
from cache.errors import CorruptArtifact
from cache.link import RedisLink
from cache.manifest import Manifest
from cache.threads import in_thread
from cache.writer import ArtifactWriter, BlobWriter

# A little under 2 MiB: with Redis's header a full 2 MiB falls into the allocator's next size class
# and takes a third more memory (measured: 1.33 bytes per byte against 1.00).
CHUNK_BYTES = 2 * 2**20 - 4096
_MAX_PER_CALL = 512
_AHEAD = 3  # calls under way while earlier answers are written


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes `start` to `start + nbytes` of blob `digest`, which is `total` long."""

    digest: str
    index: int
    nbytes: int
    total: int

    @property
    def start(self) -> int:
        return self.index * CHUNK_BYTES

    @property
    def last(self) -> bool:
        return self.start + self.nbytes == self.total


class DamagedBlob(Exception):
    """A blob that came from Redis is incomplete or not what its name says."""

    def __init__(self, digest: str, *, missing: bool) -> None:
        super().__init__(f"blob {digest} is {'incomplete' if missing else 'damaged'}")
        self.digest = digest
        self.missing = missing


def chunks_of(digest: str, total: int) -> list[Chunk]:
    """The chunks of a blob in order; an empty blob is one empty chunk."""
    return [
        Chunk(digest, index, min(CHUNK_BYTES, total - index * CHUNK_BYTES), total)
        for index in range(max(1, -(-total // CHUNK_BYTES)))
    ]


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks, in order, into calls of at most one chunk's bytes."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if batch and (size + chunk.nbytes > CHUNK_BYTES or len(batch) == _MAX_PER_CALL):
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += chunk.nbytes
    if batch:
        yield batch


async def receive(
    link: RedisLink, name_of: Callable[[Chunk], str], manifest: Manifest, disk: DiskStore
) -> None:
    """Bring every blob of `manifest` that `disk` lacks, and publish the artifact there.

    After an error nothing of it is on disk.

    Args:
        name_of: the Redis key of a chunk.

    Raises:
        DamagedBlob: a blob is missing or wrong in Redis.
        RedisAway: Redis failed in the middle.
        CacheFull, CacheError: the disk cannot take it.
    """
    writer = await in_thread(disk.writer, manifest.key)
    assembler = _Assembler(writer)
    try:
        absent = await in_thread(_hold_known, writer, manifest)
        todo = [chunk for digest in absent for chunk in chunks_of(digest, manifest.blobs[digest])]
        async with aclosing(_read_ahead(link, name_of, todo)) as answers:
            async for batch, data in answers:
                await in_thread(assembler.add, batch, data)
        await in_thread(writer.commit, manifest)
    finally:
        assembler.close()
        await in_thread(writer.abort)


def _hold_known(writer: ArtifactWriter, manifest: Manifest) -> list[str]:
    return [d for d, size in manifest.blobs.items() if not writer.hold(d, size)]


class _Assembler:
    """Writes chunks that come in order; one blob is open at a time."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer = writer
        self._open = ExitStack()
        self._blob: BlobWriter | None = None

    def add(self, batch: Sequence[Chunk], data: Sequence[bytes | None]) -> None:
        for chunk, piece in zip(batch, data, strict=True):
            if piece is None or len(piece) != chunk.nbytes:
                raise DamagedBlob(chunk.digest, missing=piece is None)
            if self._blob is None:
                self._blob = self._open.enter_context(self._writer.blob(chunk.total))
            self._blob.write(piece)
            if chunk.last:
                try:
                    self._blob.finish(chunk.digest)
                except CorruptArtifact:
                    raise DamagedBlob(chunk.digest, missing=False) from None
                self.close()

    def close(self) -> None:
        self._blob = None
        self._open.close()


async def _read_ahead(
    link: RedisLink, name_of: Callable[[Chunk], str], chunks: Sequence[Chunk]
) -> AsyncGenerator[tuple[list[Chunk], list[bytes | None]], None]:
    """Batches and what Redis has for them, in order, a few calls ahead of the consumer."""

    async def get(batch: list[Chunk]) -> tuple[list[Chunk], list[bytes | None]]:
        answer: Any = await link.command("MGET", *[name_of(chunk) for chunk in batch])
        return batch, answer

    waiting: deque[asyncio.Task[tuple[list[Chunk], list[bytes | None]]]] = deque()
    try:
        for batch in batches(chunks):
            waiting.append(asyncio.create_task(get(batch)))
            if len(waiting) > _AHEAD:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
