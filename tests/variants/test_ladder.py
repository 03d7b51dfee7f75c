"""A ladder looked at closely or at a glance: the same facts, and the same objects where nothing
changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.config import FakeModel, Model
from gateway.engine.base import EngineStats, GenerationRequest, SamplingParams
from gateway.errors import Unavailable
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.pool import VariantPool
from gateway.variants.variant import LadderSnapshot

LEVELS = ("int8", "int4-gptq-g128", "depth-75")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def pool(clock: Clock) -> AsyncIterator[VariantPool]:
    options = FakeModel(tpot_ms=1.0, build_seconds=0.01, failing_levels=("depth-75",))
    backends = [FakeBackend(Model(id=name, fake=options), LEVELS) for name in ("one", "two")]
    pool = VariantPool(backends, memory_budget=10**9, max_jobs=8, clock=clock)
    await pool.open()
    await pool.load_defaults()
    yield pool
    await pool.close()


def known(snapshot: LadderSnapshot) -> LadderSnapshot:
    """Without the counters that a glance may leave as they were."""
    levels = tuple(
        replace(f, stats=replace(f.stats, kv_used_blocks=0, prefix_hit_tokens=0, preemptions=0))
        for f in snapshot.levels
    )
    return replace(snapshot, levels=levels)


def check(pool: VariantPool) -> LadderSnapshot:
    """A glance says what a close look says."""
    glance = pool.glance("one")
    assert known(glance) == known(pool.snapshot("one"))
    return glance


async def test_a_glance_follows_every_change(pool: VariantPool, clock: Clock) -> None:
    check(pool)
    request = GenerationRequest("r", tuple(range(40)), SamplingParams(max_tokens=50))
    async with pool.lease("one", "int8", wait_s=5) as engine:
        leased = check(pool).level("int8")
        assert leased is not None
        assert leased.leases == 1
        events = engine.generate(request)
        await anext(events)  # type: ignore[call-overload]
        assert check(pool).host_running == 1
        async with pool.lease("two", "bf16", wait_s=5) as other:
            elsewhere = other.generate(request)
            await anext(elsewhere)  # type: ignore[call-overload]
            assert check(pool).host_running == 2
            await elsewhere.aclose()  # type: ignore[attr-defined]
        await events.aclose()  # type: ignore[attr-defined]
    assert check(pool).host_running == 0
    await pool.evict("one", "int8", delete=True)
    check(pool)
    building = asyncio.create_task(pool.warm("one", "int4-gptq-g128"))
    await asyncio.sleep(0.002)
    assert check(pool).building == 1
    await building
    check(pool)
    with pytest.raises(Unavailable):
        await pool.warm("one", "depth-75")
    for seconds in (0.0, 7.0, 40.0):
        clock.now = seconds
        check(pool)


async def test_what_did_not_change_is_the_same_object(pool: VariantPool) -> None:
    before = pool.glance("one").levels
    after = pool.glance("one").levels
    assert all(one is other for one, other in zip(before, after, strict=True))
    async with pool.lease("one", "bf16", wait_s=5):
        leased = pool.glance("one").levels
    kept = [one is other for one, other in zip(before, leased, strict=True)]
    assert kept == [facts.level != "bf16" for facts in before]


async def test_a_close_look_tells_of_engines_without_work(
    pool: VariantPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix hits and KV use of a resting level matter to whoever watches, not to a decision."""
    async with pool.lease("one", "bf16", wait_s=5) as engine:
        pass
    pool.glance("one")
    monkeypatch.setattr(engine, "stats", lambda: EngineStats(prefix_hit_tokens=7))
    facts = pool.snapshot("one").level("bf16")
    assert facts is not None
    assert facts.stats.prefix_hit_tokens == 7
