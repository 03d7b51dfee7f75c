"""Both tiers as one store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.blobs import hash_bytes
from cache.disk import DiskStore
from cache.errors import CacheError, CacheFull
from cache.tiered import ArtifactStore
from tests.cache.samples import MIB, build, files_under, key_of, redis_store, some_bytes
from tests.support.redis_server import RedisServer

TENSORS = {"e": some_bytes("e", 3 * MIB), "w": some_bytes("w", 100)}


class Host:
    """One gateway: its own disk, its own connection."""

    def __init__(self, root: Path, url: str | None, budget: int = 256 * MIB) -> None:
        self.hits: list[str] = []
        self.disk = DiskStore(root, budget)
        self.redis = redis_store(url) if url else None
        self.store = ArtifactStore(self.disk, self.redis, on_hit=self.hits.append)

    async def close(self) -> None:
        await self.store.close()
        if self.redis is not None:
            await self.redis.close()


@pytest.fixture
async def hosts(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[tuple[Host, Host]]:
    pair = Host(tmp_path / "a", redis_server.url), Host(tmp_path / "b", redis_server.url)
    yield pair
    for host in pair:
        await host.close()


async def test_what_one_host_built_another_fetches(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    manifest = build(one.disk, "int8", TENSORS)
    assert await two.store.fetch(key_of("int8")) is None
    await one.store.share(key_of("int8"))
    await one.store.shared()
    assert await two.store.manifest(key_of("int8")) == manifest
    assert await two.store.keys() == [key_of("int8")]
    for _ in range(2):
        artifact = await two.store.fetch(key_of("int8"))
        assert artifact is not None
        with artifact:
            assert {name: bytes(artifact.tensor(name)) for name in TENSORS} == TENSORS
    assert two.hits == ["miss", "redis", "disk"]
    assert files_under(one.disk.root) == files_under(two.disk.root)
    usage = await two.store.usage()
    assert usage.redis is not None
    assert usage.redis.blob_bytes == usage.disk.blob_bytes == 3 * MIB + 100


async def test_many_who_ask_at_once_cause_one_copy(
    hosts: tuple[Host, Host], redis_server: RedisServer
) -> None:
    one, two = hosts
    build(one.disk, "int8", TENSORS)
    await one.store.share(key_of("int8"))
    await one.store.shared()
    with redis_server.client() as client:
        before = client.info("stats")["total_net_output_bytes"]
        found = await asyncio.gather(*[two.store.fetch(key_of("int8")) for _ in range(8)])
        sent = client.info("stats")["total_net_output_bytes"] - before
    assert all(artifact is not None for artifact in found)
    assert sent < 2 * 3 * MIB


async def test_a_copy_damaged_on_disk_comes_back_from_redis(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts
    build(one.disk, "int8", TENSORS)
    await one.store.share(key_of("int8"))
    await one.store.shared()
    one.disk.blobs.path(hash_bytes(TENSORS["e"])).write_bytes(b"\0" * 3 * MIB)
    artifact = await one.store.fetch(key_of("int8"))
    assert artifact is not None
    assert artifact.tensor("e") == TENSORS["e"]
    assert one.hits == ["redis"]


async def test_deleted_in_both_tiers(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    build(one.disk, "int8", TENSORS)
    await one.store.share(key_of("int8"))
    await one.store.shared()
    assert await one.store.delete(key_of("int8"))
    assert not await one.store.delete(key_of("int8"))
    assert await one.store.keys() == await two.store.keys() == []
    assert await two.store.fetch(key_of("int8")) is None


async def test_sharing_what_is_not_there_or_twice_is_no_error(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    build(one.disk, "int8", TENSORS)
    for recipe in ("absent", "int8", "int8"):
        await one.store.share(key_of(recipe))
    await one.store.shared()
    assert await two.store.fetch(key_of("int8")) is not None


async def test_redis_going_away_never_hurts(
    hosts: tuple[Host, Host], redis_server: RedisServer
) -> None:
    one, two = hosts
    build(one.disk, "int8", TENSORS)
    redis_server.kill()
    await one.store.share(key_of("int8"))
    await one.store.shared()
    assert await one.store.fetch(key_of("int8")) is not None
    assert await two.store.fetch(key_of("int8")) is None
    assert await one.store.keys() == [key_of("int8")]
    assert (await one.store.usage()).redis is not None
    assert await one.store.delete(key_of("int8"))


async def test_without_redis_it_is_the_disk(tmp_path: Path) -> None:
    host = Host(tmp_path, None)
    build(host.disk, "int8", TENSORS)
    await host.store.share(key_of("int8"))
    await host.store.shared()
    assert await host.store.fetch(key_of("int8")) is not None
    assert await host.store.fetch(key_of("int4")) is None
    assert await host.store.manifest(key_of("int4")) is None
    assert (await host.store.usage()).redis is None
    assert host.hits == ["disk", "miss"]
    with pytest.raises(CacheError, match="not an artifact key"):
        await host.store.fetch("../x")
    await host.close()


async def test_a_full_disk_is_said(tmp_path: Path, redis_server: RedisServer) -> None:
    one = Host(tmp_path / "a", redis_server.url)
    two = Host(tmp_path / "b", redis_server.url, budget=MIB)
    build(one.disk, "int8", TENSORS)
    await one.store.share(key_of("int8"))
    await one.store.shared()
    with pytest.raises(CacheFull):
        await two.store.fetch(key_of("int8"))
    assert files_under(two.disk.root) == set()
    await one.close()
    await two.close()
