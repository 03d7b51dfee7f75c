"""Documents: on disk alone, shared through Redis, and evened out after Redis was away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cache.documents import Doc, Documents
from cache.errors import CacheError
from tests.cache.samples import files_under, redis_store, until
from tests.support.redis_server import RedisServer

Replica = Callable[[str], Documents]


@pytest.fixture
async def replica(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Replica]:
    """Makes replicas, each with a disk of its own, on one Redis."""
    made: list[tuple[Documents, Any]] = []

    def make(name: str) -> Documents:
        redis = redis_store(redis_server.url, timeout=0.5)
        made.append((Documents(tmp_path / name, redis), redis))
        return made[-1][0]

    yield make
    for documents, redis in made:
        await documents.close()
        await redis.close()


def log_of(changes: list[tuple[str, Doc | None]]) -> Callable[[str, Doc | None], None]:
    return lambda name, doc: changes.append((name, doc))


async def test_on_disk_alone(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    changes: list[tuple[str, Doc | None]] = []
    assert await documents.get("policies", "gold") is None
    stop = await documents.watch("policies", log_of(changes))
    await documents.put("policies", "gold", {"ttft_ms": 300})
    await documents.put("policies", "org/team:gold@int8", {"n": [1, None, "ü"]})
    await documents.put("cards", "gold", {"other": "namespace"})
    await documents.put("policies", "gold", {"ttft_ms": 200})
    again = Documents(tmp_path)
    assert await again.get("policies", "gold") == {"ttft_ms": 200}
    expected = {"gold": {"ttft_ms": 200}, "org/team:gold@int8": {"n": [1, None, "ü"]}}
    assert await again.all("policies") == expected
    assert await documents.delete("policies", "gold")
    assert not await documents.delete("policies", "gold")
    assert await again.get("policies", "gold") is None
    assert list(await again.all("policies")) == ["org/team:gold@int8"]
    stop()
    await documents.put("policies", "gold", {"ttft_ms": 100})
    assert changes == [
        ("gold", {"ttft_ms": 300}),
        ("org/team:gold@int8", {"n": [1, None, "ü"]}),
        ("gold", {"ttft_ms": 200}),
        ("gold", None),
    ]
    assert await again.get("policies", "gold") == {"ttft_ms": 100}, "a deletion is a version too"


@pytest.mark.parametrize(
    ("namespace", "name", "doc"),
    [
        ("../x", "a", {}),
        ("policies", "../../x", {}),
        ("policies", "", {}),
        ("policies", "a", {"x": object()}),
        ("policies", "a", {"x": "y" * 2**20}),
    ],
)
async def test_bad_documents_are_refused(
    tmp_path: Path, namespace: str, name: str, doc: Doc
) -> None:
    documents = Documents(tmp_path)
    with pytest.raises(CacheError):
        await documents.put(namespace, name, doc)
    assert files_under(tmp_path) == set()


async def test_an_unreadable_file_counts_as_absent(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    await documents.put("policies", "gold", {"a": 1})
    (tmp_path / "documents" / "policies" / "gold.json").write_bytes(b'{"version": 3, "do')
    assert await documents.get("policies", "gold") is None
    await documents.put("policies", "gold", {"a": 2})
    assert await documents.get("policies", "gold") == {"a": 2}


async def test_a_failing_watcher_does_not_hurt_the_others(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    changes: list[str] = []

    def broken(_name: str, _doc: Doc | None) -> None:
        raise RuntimeError

    async def works(name: str, _doc: Doc | None) -> None:
        changes.append(name)

    await documents.watch("policies", broken)
    await documents.watch("policies", works)
    await documents.put("policies", "gold", {})
    assert changes == ["gold"]


async def test_replicas_hear_of_a_change_once(replica: Replica) -> None:
    one, two = replica("one"), replica("two")
    await one.put("policies", "before", {"v": 0})
    heard: dict[str, list[tuple[str, Doc | None]]] = {"one": [], "two": []}
    await one.watch("policies", log_of(heard["one"]))
    await two.watch("policies", log_of(heard["two"]))
    assert await two.get("policies", "before") == {"v": 0}
    for value in range(3):
        await one.put("policies", "gold", {"v": value})
        assert await two.get("policies", "gold") == {"v": value}
        await until(lambda value=value: heard["two"][-1:] == [("gold", {"v": value})])
    await two.delete("policies", "gold")
    await until(lambda: heard["one"][-1:] == [("gold", None)])
    expected = [*[("gold", {"v": value}) for value in range(3)], ("gold", None)]
    assert heard == {"one": expected, "two": expected}
    assert await one.all("policies") == await two.all("policies") == {"before": {"v": 0}}


async def test_a_change_reaches_the_other_disk(replica: Replica, tmp_path: Path) -> None:
    one, two = replica("one"), replica("two")
    await two.watch("policies", log_of([]))
    await one.put("policies", "gold", {"v": 1})
    alone = Documents(tmp_path / "two")

    async def arrived() -> bool:
        return await alone.get("policies", "gold") == {"v": 1}

    await until(arrived)


async def test_a_restarted_empty_redis_is_filled_again(
    replica: Replica, redis_server: RedisServer
) -> None:
    one, two = replica("one"), replica("two")
    heard: list[tuple[str, Doc | None]] = []
    await two.watch("policies", log_of(heard))
    await one.put("policies", "gold", {"v": 1})
    await until(lambda: heard == [("gold", {"v": 1})])
    redis_server.kill()
    await one.put("policies", "gold", {"v": 2})
    assert await one.get("policies", "gold") == {"v": 2}
    assert await two.get("policies", "gold") == {"v": 1}
    redis_server.start()
    await until(lambda: heard == [("gold", {"v": 1}), ("gold", {"v": 2})])
    three = replica("three")
    assert await three.get("policies", "gold") == {"v": 2}


async def test_redis_wins_when_both_sides_changed_apart(replica: Replica, tmp_path: Path) -> None:
    one, two = replica("one"), replica("two")
    await one.put("policies", "gold", {"v": 1})
    await one.close()
    alone = Documents(tmp_path / "one")  # the same disk, cut off from Redis
    await alone.put("policies", "gold", {"v": "apart"})
    await two.put("policies", "gold", {"v": "redis"})
    assert await alone.get("policies", "gold") == {"v": "apart"}
    heard: list[tuple[str, Doc | None]] = []
    again = replica("one")
    await again.watch("policies", log_of(heard))
    await until(lambda: heard == [("gold", {"v": "redis"})])
    for documents in (alone, again, two):
        assert await documents.get("policies", "gold") == {"v": "redis"}


async def test_garbage_in_redis_does_not_hurt(replica: Replica, redis_server: RedisServer) -> None:
    one = replica("one")
    await one.put("policies", "gold", {"v": 1})
    with redis_server.client() as client:
        client.hset("pressgate:documents:policies", "gold", "not ours")
        client.hset("pressgate:documents:policies", "bad", '7 {"doc": 5}')
        client.publish("pressgate:bus:documents", b"../../etc passwd\xff")
    assert await one.get("policies", "gold") == {"v": 1}
    assert await one.all("policies") == {"gold": {"v": 1}}
    await one.put("policies", "gold", {"v": 2})
    assert await one.get("policies", "gold") == {"v": 2}


def counted(by: str) -> Callable[[Doc | None], Doc]:
    return lambda doc: {**(doc or {}), by: (doc or {}).get(by, 0) + 1}


async def test_updates_build_on_each_other(tmp_path: Path) -> None:
    one, two = Documents(tmp_path), Documents(tmp_path)
    changes: list[tuple[str, Doc | None]] = []
    await one.watch("policies", log_of(changes))
    names = [("one", one), ("two", two)] * 10
    await asyncio.gather(*(d.update("policies", "gold", counted(name)) for name, d in names))
    assert await one.get("policies", "gold") == {"one": 10, "two": 10}
    counts = [doc["one"] for _, doc in changes if doc is not None]
    assert counts == sorted(set(counts)), "never of an older version after a newer one"
    assert counts[-1] == 10
    assert await one.update("policies", "gold", lambda _: None) is None
    assert await two.get("policies", "gold") is None


async def test_an_update_that_fails_changes_nothing(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    await documents.put("policies", "gold", {"v": 1})

    def refuse(doc: Doc | None) -> Doc:
        raise LookupError(doc)

    with pytest.raises(LookupError):
        await documents.update("policies", "gold", refuse)
    with pytest.raises(CacheError, match="may be"):
        await documents.update("policies", "gold", lambda _: {"x": "y" * 2**20})
    with pytest.raises(CacheError, match="not a document name"):
        await documents.update("policies", "../gold", lambda _: {})
    assert await documents.get("policies", "gold") == {"v": 1}


async def test_updates_of_replicas_build_on_each_other(
    replica: Replica, redis_server: RedisServer
) -> None:
    homes = [replica(name) for name in ("one", "two", "three")]
    await asyncio.gather(
        *(home.update("policies", "gold", counted("n")) for home in homes for _ in range(12))
    )
    for home in homes:
        assert await home.get("policies", "gold") == {"n": 36}
    redis_server.kill()
    await homes[0].update("policies", "gold", counted("n"))
    assert await homes[0].get("policies", "gold") == {"n": 37}
    redis_server.start()

    async def healed() -> bool:
        return all([await home.get("policies", "gold") == {"n": 37} for home in homes])

    await until(healed)


async def test_a_full_redis_leaves_the_disk(tmp_path: Path) -> None:
    options = {"maxmemory": "1mb", "maxmemory-policy": "noeviction"}
    with RedisServer(options) as server:
        redis = redis_store(server.url)
        documents = Documents(tmp_path, redis)
        await documents.put("policies", "gold", {"v": "x" * 500_000})
        await documents.put("policies", "gold", {"v": "y" * 500_000})
        assert await documents.get("policies", "gold") == {"v": "y" * 500_000}
        assert await Documents(tmp_path).get("policies", "gold") == {"v": "y" * 500_000}
        await documents.close()
        await redis.close()
