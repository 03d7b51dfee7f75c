"""The pool, driven for real with the stand-in backend: states, leases, memory, joins, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.config import FakeModel, Model
from gateway.engine.base import EngineFailed, GenerationRequest, SamplingParams
from gateway.errors import Conflict, NotFound, Overloaded, Unavailable
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.jobs import JobState
from gateway.variants.pool import VariantPool
from gateway.variants.variant import State

LEVELS = ("int8", "int4-gptq-g128", "depth-75")
DENSE = 32_000_000


async def open_pool(budget: int = 10**9, max_jobs: int = 8, **options: object) -> VariantPool:
    backend = FakeBackend(Model(id="fake", fake=FakeModel(tpot_ms=0.1, **options)), LEVELS)  # type: ignore[arg-type]
    pool = VariantPool([backend], memory_budget=budget, max_jobs=max_jobs)
    await pool.open()
    await pool.load_defaults()
    return pool


@pytest.fixture
async def pool() -> AsyncIterator[VariantPool]:
    pool = await open_pool()
    yield pool
    await pool.close()


def state(pool: VariantPool, level: str) -> State:
    facts = pool.snapshot("fake").level(level)
    assert facts is not None
    return facts.state


async def test_starts_with_the_default_level_ready_and_the_rest_absent(pool: VariantPool) -> None:
    assert pool.ready
    assert state(pool, "bf16") is State.READY
    assert {state(pool, level) for level in LEVELS} == {State.ABSENT}


async def test_ladder_is_ordered_best_quality_first(pool: VariantPool) -> None:
    ratios = [facts.card.perplexity_ratio for facts in pool.snapshot("fake").levels]
    assert ratios == sorted(ratios)
    assert ratios[0] == 1.0


async def test_lease_builds_loads_and_generates(pool: VariantPool) -> None:
    async with pool.lease("fake", "int8", wait_s=5) as engine:
        request = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=3))
        tokens = [event.token async for event in engine.generate(request)]
        assert len(tokens) == 3
        facts = pool.snapshot("fake").level("int8")
        assert facts is not None
        assert facts.leases == 1
    assert state(pool, "int8") is State.READY
    assert [job.state for job in pool.jobs()] == [JobState.DONE]


async def test_fifty_requests_for_a_cold_level_cause_one_build(pool: VariantPool) -> None:
    async def one() -> object:
        async with pool.lease("fake", "int8", wait_s=10) as engine:
            return engine

    engines = await asyncio.gather(*(one() for _ in range(50)))
    assert len(set(map(id, engines))) == 1
    assert len(pool.jobs()) == 1


async def test_a_caller_who_leaves_does_not_stop_the_build_for_others(pool: VariantPool) -> None:
    leaver = asyncio.create_task(pool.wait_ready("fake", "int8", 10))
    stayer = asyncio.create_task(pool.wait_ready("fake", "int8", 10))
    await asyncio.sleep(0.05)
    leaver.cancel()
    await stayer
    assert state(pool, "int8") is State.READY


async def test_a_wait_that_is_too_short_says_when_to_come_back() -> None:
    pool = await open_pool(build_seconds=5)
    with pytest.raises(Unavailable) as caught:
        async with pool.lease("fake", "int8", wait_s=0.05):
            pass
    assert caught.value.retry_after is not None
    assert 1 <= caught.value.retry_after <= 5
    assert state(pool, "int8") is State.BUILDING
    await pool.close()


async def test_a_failed_build_is_told_and_not_repeated_at_once() -> None:
    pool = await open_pool(failing_levels=("int8",))
    for _ in range(3):
        with pytest.raises(Unavailable, match="set to fail"):
            await pool.wait_ready("fake", "int8", 5)
    assert len(pool.jobs()) == 1
    assert pool.jobs()[0].error == "int8 is set to fail"
    assert state(pool, "int8") is State.FAILED
    await pool.close()


async def test_memory_budget_unloads_the_least_recently_used_and_never_a_leased_level() -> None:
    pool = await open_pool(budget=int(DENSE * 1.7))
    await pool.warm("fake", "int8")  # half of dense: both fit
    assert pool.memory_used() <= pool.memory_budget
    async with pool.lease("fake", "int8", wait_s=5):
        await pool.warm("fake", "depth-75")  # needs room: dense goes, int8 is held
        assert state(pool, "int8") is State.READY
    assert state(pool, "bf16") is State.STORED
    assert pool.memory_used() <= pool.memory_budget
    await pool.close()


async def use(pool: VariantPool, level: str, times: int = 1) -> None:
    for _ in range(times):
        async with pool.lease("fake", level, wait_s=5):
            pass


async def test_room_is_taken_from_what_is_asked_for_least_however_recently() -> None:
    pool = await open_pool(budget=int(DENSE * 1.4), load_seconds=0.01)
    await pool.evict("fake", "bf16")
    await use(pool, "int8", times=5)
    await use(pool, "int4-gptq-g128")  # the last one used, but seldom
    await use(pool, "depth-75")
    assert state(pool, "int8") is State.READY
    assert state(pool, "int4-gptq-g128") is State.STORED
    [gone] = pool.memory_plan()["evicted"]
    assert gone["level"] == "fake@int4-gptq-g128"
    assert "left for fake@depth-75" in gone["why"]
    await pool.close()


async def test_a_pinned_level_stays_whatever_needs_room() -> None:
    pool = await open_pool(budget=int(DENSE * 1.7))
    await pool.pin("fake", "int8")
    await pool.warm("fake", "depth-75")
    await pool.warm("fake", "bf16")
    assert state(pool, "int8") is State.READY
    assert pool.memory_used() <= pool.memory_budget
    facts = pool.snapshot("fake").level("int8")
    assert facts is not None
    assert facts.pinned
    assert facts.held
    with pytest.raises(Conflict, match="unpin it first"):
        await pool.evict("fake", "int8")
    pool.unpin("fake", "int8")
    await pool.evict("fake", "int8")
    await pool.close()


async def test_more_cannot_be_pinned_than_there_is_room_for() -> None:
    pool = await open_pool(budget=int(DENSE * 1.4))
    await pool.pin("fake", "int8")
    with pytest.raises(Conflict, match="fake@bf16, fake@int8 pinned together"):
        await pool.pin("fake", "bf16")
    assert [row["kept"] for row in pool.memory_plan()["levels"]].count("pinned") == 1
    await pool.close()


async def test_a_level_that_cannot_be_loaded_is_not_pinned() -> None:
    pool = await open_pool(failing_levels=("int8",))
    with pytest.raises(Unavailable):
        await pool.pin("fake", "int8")
    facts = pool.snapshot("fake").level("int8")
    assert facts is not None
    assert not facts.pinned
    await pool.close()


async def test_the_memory_plan_tells_who_would_leave_first() -> None:
    pool = await open_pool()
    await use(pool, "int8", times=3)
    await pool.warm("fake", "depth-75")
    async with pool.lease("fake", "bf16", wait_s=5):
        plan = pool.memory_plan()
    rows = {row["level"]: row for row in plan["levels"]}
    assert rows["fake@bf16"]["kept"] == "in use"
    assert rows["fake@bf16"]["leaves"] is None
    assert rows["fake@depth-75"]["leaves"] == 1
    assert rows["fake@int8"]["leaves"] == 2
    assert plan["weight_bytes"] == sum(row["bytes"] for row in plan["levels"])
    await pool.close()


async def test_no_room_beside_leased_levels_is_an_honest_refusal() -> None:
    pool = await open_pool(budget=int(DENSE * 1.1))
    async with pool.lease("fake", "bf16", wait_s=5):
        with pytest.raises(Overloaded) as caught:
            await pool.warm("fake", "int8")
        assert caught.value.error_code == "out_of_memory"
        assert pool.memory_used() <= pool.memory_budget
    await pool.warm("fake", "int8")
    assert state(pool, "int8") is State.READY
    await pool.close()


async def test_evict_refuses_a_leased_level_then_frees_it(pool: VariantPool) -> None:
    async with pool.lease("fake", "int8", wait_s=5):
        with pytest.raises(Conflict, match="serves 1 request"):
            await pool.evict("fake", "int8")
    used = pool.memory_used()
    await pool.evict("fake", "int8")
    assert state(pool, "int8") is State.STORED
    assert pool.memory_used() < used
    await pool.evict("fake", "int8", delete=True)
    assert state(pool, "int8") is State.ABSENT


async def test_lease_during_unload_waits_and_loads_again() -> None:
    pool = await open_pool(load_seconds=0.05)
    await pool.warm("fake", "int8")
    evicting = asyncio.create_task(pool.evict("fake", "int8"))
    await asyncio.sleep(0)
    async with pool.lease("fake", "int8", wait_s=5):
        assert state(pool, "int8") is State.READY
    await evicting
    assert state(pool, "int8") is State.READY
    await pool.close()


async def test_an_engine_that_dies_is_replaced(pool: VariantPool) -> None:
    with pytest.raises(EngineFailed):
        async with pool.lease("fake", "bf16", wait_s=5) as first:
            raise EngineFailed("worker gone")
    async with pool.lease("fake", "bf16", wait_s=5) as second:
        assert second is not first


async def test_an_artifact_that_vanished_is_built_again(pool: VariantPool) -> None:
    await pool.warm("fake", "int8")
    await pool.evict("fake", "int8")
    backend = pool._roster.backend("fake")
    await backend.delete("int8")  # behind the pool's back, as a corrupt blob would be
    await pool.warm("fake", "int8")
    assert state(pool, "int8") is State.READY
    assert len(pool.jobs()) == 2


async def test_the_queue_of_builds_is_bounded() -> None:
    pool = await open_pool(build_seconds=5, max_jobs=2)
    await pool.request_build("fake", "int8", reason="test")
    await pool.request_build("fake", "depth-75", reason="test")
    with pytest.raises(Overloaded, match="limit is 2"):
        await pool.request_build("fake", "int4-gptq-g128", reason="test")
    assert state(pool, "int4-gptq-g128") is State.ABSENT
    await pool.close()


async def test_building_what_is_there_is_a_conflict(pool: VariantPool) -> None:
    with pytest.raises(Conflict, match="ready already"):
        await pool.request_build("fake", "bf16", reason="test")


@pytest.mark.parametrize(
    ("model", "level", "names"),
    [
        pytest.param("nope", "int8", "there is fake", id="model"),
        pytest.param("fake", "int3", "int4-gptq-g128", id="level"),
    ],
)
async def test_unknown_names_list_what_there_is(
    pool: VariantPool, model: str, level: str, names: str
) -> None:
    with pytest.raises(NotFound, match=names):
        async with pool.lease(model, level, wait_s=1):
            pass


async def test_closing_in_the_middle_of_a_build_leaves_nothing_running() -> None:
    pool = await open_pool(build_seconds=60)
    waiting = asyncio.create_task(pool.wait_ready("fake", "int8", 60))
    await asyncio.sleep(0.05)
    await pool.close()
    with pytest.raises(Unavailable):
        await waiting
    assert pool.jobs()[0].state is JobState.CANCELLED


async def test_two_requests_on_a_dead_engine_drop_it_once(pool: VariantPool) -> None:
    failing = asyncio.Event()

    async def fails_late() -> None:
        async with pool.lease("fake", "bf16", wait_s=5):
            await failing.wait()
            raise EngineFailed("seen late")

    late = asyncio.create_task(fails_late())
    await asyncio.sleep(0)
    with pytest.raises(EngineFailed):
        async with pool.lease("fake", "bf16", wait_s=5) as first:
            raise EngineFailed("worker gone")
    async with pool.lease("fake", "bf16", wait_s=5) as second:
        assert second is not first
    failing.set()
    with pytest.raises(EngineFailed):
        await late
    async with pool.lease("fake", "bf16", wait_s=5) as still:
        assert still is second


async def test_deleting_a_level_while_it_is_wanted_leaves_one_engine(pool: VariantPool) -> None:
    await pool.warm("fake", "int8")
    evicting = asyncio.create_task(pool.evict("fake", "int8", delete=True))
    await asyncio.sleep(0)
    async with pool.lease("fake", "int8", wait_s=5) as engine:
        await evicting
        assert state(pool, "int8") is State.READY
        async with pool.lease("fake", "int8", wait_s=5) as same:
            assert same is engine


async def test_what_cannot_fit_unloads_nobody() -> None:
    pool = await open_pool(budget=int(DENSE * 1.6))
    await pool.warm("fake", "int8")
    async with pool.lease("fake", "bf16", wait_s=5):
        with pytest.raises(Overloaded):
            await pool.warm("fake", "depth-75")
    assert state(pool, "int8") is State.READY
    await pool.close()


async def test_kv_is_kept_apart_from_weights() -> None:
    backend = FakeBackend(Model(id="fake", fake=FakeModel()), LEVELS)
    pool = VariantPool([backend], memory_budget=DENSE, max_jobs=2, kv_budget=DENSE // 4)
    await pool.open()
    with pytest.raises(Overloaded):
        await pool.load_defaults()
    assert not pool.ready
    assert pool.snapshot("fake").weight_budget == DENSE - DENSE // 4
    await pool.warm("fake", "int8")
    assert pool.snapshot("fake").weight_used > 0
    await pool.close()
