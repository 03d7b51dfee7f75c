"""Artifacts made of random bytes, and a patient wait."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from cache.chunks import CHUNK_BYTES
from cache.disk import DiskStore
from cache.keys import variant_key
from cache.manifest import Manifest
from cache.redis import RedisStore

MIB = 2**20


def key_of(recipe: str) -> str:
    return variant_key(
        model="docs-17m", revision="main", recipe=recipe, source="ab", calibration="", seed=0
    )


def some_bytes(seed: int | str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def build(
    store: DiskStore, recipe: str, tensors: dict[str, bytes], *, build_seconds: float = 1.0
) -> Manifest:
    """Write and publish an artifact of U8 tensors."""
    key = key_of(recipe)
    with store.writer(key) as writer:
        records = {n: writer.put(n, data, "U8", (len(data),)) for n, data in tensors.items()}
        manifest = Manifest(
            key=key,
            model="docs-17m",
            recipe=recipe,
            tensors=records,
            build_seconds=build_seconds,
        )
        writer.commit(manifest)
    return manifest


def files_under(root: Path) -> set[str]:
    """Relative paths of all files that hold data (lock files and use counts left out)."""
    return {
        str(p.relative_to(root))
        for p in root.rglob("*")
        if p.is_file() and p.name not in {"lock", ".lock"} and "uses" not in p.parts
    }


async def until(condition: Callable[[], bool | Awaitable[bool]], *, seconds: float = 20.0) -> None:
    """Return once `condition` holds; fail the test if it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.02)


def redis_store(url: str, **settings: object) -> RedisStore:
    defaults: dict[str, object] = {
        "budget": 256 * MIB,
        "ttl": 600.0,
        "variant_limit": 128 * MIB,
        "timeout": 1.0,
    }
    return RedisStore(url, **(defaults | settings))  # type: ignore[arg-type]


TENSORS = {
    "large": some_bytes("large", 5 * MIB + 3),
    "chunk": some_bytes("chunk", CHUNK_BYTES),
    "small": some_bytes("small", 10),
    "empty": b"",
}


async def share(redis: RedisStore, disk: DiskStore, recipe: str) -> bool:
    """Copy a stored artifact to Redis."""
    artifact = disk.read(key_of(recipe))
    assert artifact is not None
    with artifact:
        return await redis.share(artifact)
