"""The Redis tier on a real, healthy server."""

from __future__ import annotations

from collections import Counter

import pytest

from cache.blobs import hash_bytes
from cache.chunks import CHUNK_BYTES, batches, chunks_of
from cache.disk import DiskStore, Event
from cache.redis import RedisStore
from tests.cache.samples import (
    MIB,
    TENSORS,
    build,
    files_under,
    key_of,
    redis_store,
    share,
    some_bytes,
)
from tests.support.redis_server import RedisServer


def test_chunks_cover_a_blob_and_batches_are_bounded() -> None:
    for total in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES):
        chunks = chunks_of("d", total)
        assert sum(c.nbytes for c in chunks) == total
        assert [c.start for c in chunks] == [i * CHUNK_BYTES for i in range(len(chunks))]
        assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    many = [c for i in range(50) for c in chunks_of(f"d{i}", i * 100_000)]
    grouped = list(batches(many))
    assert [c for batch in grouped for c in batch] == many
    assert all(sum(c.nbytes for c in batch) <= CHUNK_BYTES for batch in grouped)


async def test_a_second_host_gets_the_artifact_byte_for_byte(
    store: RedisStore, here: DiskStore, there: DiskStore, redis_server: RedisServer
) -> None:
    manifest = build(here, "int8", TENSORS)
    assert await share(store, here, "int8")
    other = redis_store(redis_server.url)
    assert await other.fetch(key_of("int8"), there)
    await other.close()
    with there.read(key_of("int8")) as artifact:  # type: ignore[union-attr]
        assert artifact.manifest == manifest
        for name, data in TENSORS.items():
            assert artifact.tensor(name) == data
    assert files_under(there.root) == files_under(here.root)


async def test_shared_blobs_travel_and_lie_once(
    store: RedisStore, here: DiskStore, redis_server: RedisServer
) -> None:
    embedding = some_bytes("e", 3 * MIB)
    for recipe in ("int8", "int4"):
        build(here, recipe, {"e": embedding, "w": recipe.encode()})
        assert await share(store, here, recipe)
    usage = await store.usage()
    assert (usage.up, usage.artifacts, usage.blob_bytes) == (True, 2, 3 * MIB + 8)
    assert await store.keys() == sorted([key_of("int8"), key_of("int4")])
    assert await store.delete(key_of("int8"))
    assert not await store.delete(key_of("int8"))
    assert (await store.usage()).blob_bytes == 3 * MIB + 4
    assert await store.delete(key_of("int4"))
    with redis_server.client() as client:
        assert client.keys("*") == []


async def test_a_host_asks_only_for_what_it_lacks(
    store: RedisStore, here: DiskStore, there: DiskStore, redis_server: RedisServer
) -> None:
    embedding = some_bytes("e", 3 * MIB)
    build(here, "int8", {"e": embedding, "w": b"8"})
    build(there, "int4", {"e": embedding, "w": b"4"})
    await share(store, here, "int8")
    with redis_server.client() as client:
        before = client.info()["total_net_output_bytes"]
        assert await store.fetch(key_of("int8"), there)
        assert client.info()["total_net_output_bytes"] - before < MIB
    assert there.verify().corrupt == ()


@pytest.mark.parametrize("how", ["flip", "short", "long", "gone"])
async def test_a_damaged_chunk_is_found_removed_and_missed(
    here: DiskStore, there: DiskStore, redis_server: RedisServer, how: str
) -> None:
    events: Counter[Event] = Counter()
    store = redis_store(redis_server.url, on_event=lambda event, _what: events.update([event]))
    build(here, "int8", TENSORS)
    await share(store, here, "int8")
    with redis_server.client() as client:
        digest = hash_bytes(TENSORS["large"])
        name = next(client.scan_iter(f"*{digest}*:1"))
        data = client.get(name)
        assert data is not None
        if how == "flip":
            client.set(name, bytes([data[0] ^ 1]) + data[1:])
        elif how == "short":
            client.set(name, data[:-1])
        elif how == "long":
            client.set(name, data + data)
        else:
            client.delete(name)
        assert not await store.fetch(key_of("int8"), there)
        assert files_under(there.root) == set()
        assert list(there.staging.iterdir()) == []
        assert list(client.scan_iter(f"*{digest}*")) == []
    assert events == ({} if how == "gone" else {Event.CORRUPTION: 1})
    assert await store.keys() == []
    assert await share(store, here, "int8"), "whoever has it on disk can share it again"
    assert await store.fetch(key_of("int8"), there)
    await store.close()


async def test_a_damaged_or_foreign_manifest_is_removed(
    store: RedisStore, here: DiskStore, there: DiskStore, redis_server: RedisServer
) -> None:
    build(here, "int8", TENSORS)
    build(here, "int4", {"w": b"4"})
    await share(store, here, "int4")
    await share(store, here, "int8")
    with redis_server.client() as client:
        other = client.get(f"pressgate:manifest:{key_of('int4')}")
        assert other is not None
        for bad in (b"{", other):
            client.set(f"pressgate:manifest:{key_of('int8')}", bad)
            assert not await store.fetch(key_of("int8"), there)
            assert not client.exists(f"pressgate:manifest:{key_of('int8')}")
        client.hset(f"pressgate:manifest:{key_of('int8')}", "of", "another type")
        assert not await store.fetch(key_of("int8"), there)


async def test_a_manifest_is_visible_only_with_all_its_chunks(
    store: RedisStore, here: DiskStore, there: DiskStore, redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A chunk vanishes between the upload and the publishing."""
    build(here, "int8", TENSORS)
    real = store._upload

    async def upload_and_lose(*args: object) -> None:
        await real(*args)  # type: ignore[arg-type]
        with redis_server.client() as client:
            client.delete(next(client.scan_iter(f"*{hash_bytes(TENSORS['chunk'])}*")))

    monkeypatch.setattr(store, "_upload", upload_and_lose)
    assert not await share(store, here, "int8")
    assert await store.manifest(key_of("int8")) is None
    assert not await store.fetch(key_of("int8"), there)


async def test_time_to_live_is_set_everywhere_and_renewed_by_use(
    here: DiskStore, there: DiskStore, redis_server: RedisServer
) -> None:
    store = redis_store(redis_server.url, ttl=1000.0)
    build(here, "int8", TENSORS)
    await share(store, here, "int8")
    with redis_server.client() as client:
        names = [*client.scan_iter("*blob*"), *client.scan_iter("*manifest*")]
        assert len(names) == 3 + 1 + 1 + 1 + 1
        assert all(990 < client.ttl(name) <= 1000 for name in names)
        for name in names:
            client.expire(name, 5)
        assert await store.fetch(key_of("int8"), there)
        assert all(990 < client.ttl(name) <= 1000 for name in names)
        for name in client.scan_iter("*manifest*"):
            client.delete(name)  # as if expired
    assert await store.keys() == []
    assert (await store.usage()).artifacts == 0
    await store.close()


async def test_large_artifacts_stay_on_disk(here: DiskStore, redis_server: RedisServer) -> None:
    store = redis_store(redis_server.url, variant_limit=MIB)
    build(here, "int8", {"w": some_bytes(1, MIB + 1)})
    assert not await share(store, here, "int8")
    with redis_server.client() as client:
        assert client.keys("*") == []
    await store.close()


async def test_the_byte_budget_evicts_the_least_valuable(
    here: DiskStore, there: DiskStore, redis_server: RedisServer
) -> None:
    evicted: list[str] = []
    store = redis_store(
        redis_server.url, budget=10 * MIB, on_event=lambda _event, key: evicted.append(key)
    )
    build(here, "cheap", {"w": some_bytes(1, 4 * MIB)}, build_seconds=1)
    build(here, "dear", {"w": some_bytes(2, 4 * MIB)}, build_seconds=100)
    build(here, "new", {"w": some_bytes(3, 4 * MIB)}, build_seconds=10)
    build(here, "huge", {"w": some_bytes(4, 11 * MIB)}, build_seconds=10)
    for recipe in ("cheap", "dear", "new"):
        assert await share(store, here, recipe)
    assert evicted == [key_of("cheap")]
    assert await store.keys() == sorted([key_of("dear"), key_of("new")])
    assert not await share(store, here, "huge")
    assert len(await store.keys()) == 2, "nothing was given up in vain"
    assert await store.fetch(key_of("dear"), there)
    await store.close()
