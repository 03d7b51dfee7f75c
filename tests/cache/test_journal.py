"""Journals: on disk over restarts, bounded in time and bytes, shared through a real Redis."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.journal import Journal
from cache.journal_disk import LEAST_BUDGET, Entry, JournalFile
from cache.redis import RedisStore
from cache.stamps import first_stamp, new_stamp, stamped_at
from tests.cache.samples import redis_store, some_bytes
from tests.support.redis_server import RedisServer

DAY = 86_400.0
NOW = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def entry(at: float, size: int = 600, shared: str = "a") -> Entry:
    name = new_stamp("dec", at)
    return Entry(name, some_bytes(name, size), shared * 64, f"shared {shared}".encode())


def journal(folder: Path, clock: Clock, redis: RedisStore | None = None, **more: Any) -> Journal:
    options = {"budget": 2**25, "redis_budget": 2**22} | more
    path = folder / "decisions.sqlite"
    return Journal(path, prefix="dec", ttl=DAY, redis=redis, clock=clock, **options)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = redis_store(redis_server.url, timeout=0.5)
    yield store
    await store.close()


@given(st.lists(st.floats(0, 2.0**48 / 1000 - 1), min_size=2))
def test_ids_tell_their_time_and_sort_by_it(moments: list[float]) -> None:
    moments.sort()
    stamps = [new_stamp("dec", at) for at in moments]
    assert [stamped_at("dec", stamp) for stamp in stamps] == [
        round(1e3 * at) / 1e3 for at in moments
    ]
    for at, stamp, later in zip(moments, stamps, moments[1:], strict=False):
        assert first_stamp("dec", at) <= stamp < first_stamp("dec", later + 0.0011)
    assert len(set(stamps)) == len(stamps)


@pytest.mark.parametrize(
    "name",
    ["", "dec-", "dec-" + "0" * 25, "dec-" + "u" * 26, "job-" + "0" * 26, "dec-8" + "0" * 25],
)
def test_other_names_are_no_ids(name: str) -> None:
    assert stamped_at("dec", name) is None


async def test_a_restart_keeps_entries_and_time_ends_them(tmp_path: Path) -> None:
    clock = Clock()
    first = journal(tmp_path, clock)
    kept = [entry(NOW + i, shared="ab"[i % 2]) for i in range(50)]
    assert await first.write(kept) == (0, 0)
    await first.close()
    again = journal(tmp_path, clock)
    assert [await again.read(e.id) for e in kept] == kept
    assert await again.read(new_stamp("dec", NOW)) is None
    assert await again.read("dec-nonsense") is None
    clock.now = NOW + DAY + 25.5
    found = [await again.read(e.id) for e in kept]
    assert found == [None] * 26 + kept[26:]
    late = entry(clock.now, shared="b")
    await again.write([late])
    assert again._file.count() == 25
    clock.now += DAY - 1
    newest = entry(clock.now, shared="c")
    await again.write([newest])
    assert [await again.read(e.id) for e in (late, newest)] == [late, newest]
    with sqlite3.connect(tmp_path / "decisions.sqlite") as file:
        digests = file.execute("SELECT digest FROM shared ORDER BY digest").fetchall()
    assert [digest[0] for (digest,) in digests] == ["b", "c"], "nothing shared outlives its entries"
    await again.close()


def test_the_file_stays_within_its_budget_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    file = JournalFile(path, budget=LEAST_BUDGET)
    entries = [entry(NOW + i, size=3000) for i in range(8000)]  # 24 MB into 16
    for start in range(0, len(entries), 500):
        file.write(entries[start : start + 500], oldest="dec-0")
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= LEAST_BUDGET
    found = [file.read(e.id) is not None for e in entries]
    assert all(found[-1000:])
    assert not any(found[:1000])
    assert found == sorted(found), "the oldest went first"
    file.close()


def test_a_damaged_file_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    path.write_bytes(b"no database " * 1000)
    file = JournalFile(path, budget=LEAST_BUDGET)
    one = entry(NOW)
    file.write([one], oldest="dec-0")
    assert file.read(one.id) == one
    file.close()


async def test_replicas_read_each_others_entries(tmp_path: Path, redis: RedisStore) -> None:
    clock = Clock()
    one, other = (journal(tmp_path / name, clock, redis) for name in "ab")
    kept = [entry(NOW + 30 * i) for i in range(300)]
    assert await one.write(kept) == (0, 0)
    assert [await other.read(e.id) for e in kept] == kept
    for each in (one, other):
        await each.close()


async def test_what_is_in_redis_is_bounded_and_expires(
    tmp_path: Path, redis: RedisStore, redis_server: RedisServer
) -> None:
    clock = Clock()
    one = journal(tmp_path / "a", clock, redis, redis_budget=100_000)
    other = journal(tmp_path / "b", clock, redis)
    kept = [entry(NOW + 60 * i, size=5000) for i in range(40)]
    for e in kept:
        assert await one.write([e]) == (0, 0)
    found = [await other.read(e.id) is not None for e in kept]
    assert found == sorted(found)
    assert 15 <= sum(found) <= 20
    with redis_server.client() as client:
        names = client.keys("*journal*")
        assert len(names) == sum(found) + 2
        assert all(0 < client.ttl(name) <= DAY + 120 for name in names)
        clock.now = NOW + 60 * 39 + DAY
        await one.write([entry(clock.now)])
        assert len(client.keys("*journal*")) <= 4, "minutes past their time are gone"
    for each in (one, other):
        await each.close()


async def test_without_redis_the_disk_does(
    tmp_path: Path, redis: RedisStore, redis_server: RedisServer
) -> None:
    clock = Clock()
    one = journal(tmp_path, clock, redis)
    redis_server.kill()
    kept = [entry(NOW + i) for i in range(3)]
    assert await one.write(kept) == (0, 3)
    assert [await one.read(e.id) for e in kept] == kept
    assert await one.read(new_stamp("dec", NOW)) is None
    await one.close()
