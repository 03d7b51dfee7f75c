"""Two levels of one artifact: built once, held once in memory, forgotten together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from compressors.recipe import Recipe, expand
from gateway.app import open_backends
from gateway.config import FakeModel, Model
from gateway.engine.runner import build_model, forward_logits
from gateway.errors import Conflict, Overloaded
from gateway.variants.artifact import weights_of
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.jobs import JobState
from gateway.variants.local_backend import LocalBackend
from gateway.variants.pool import VariantPool
from gateway.variants.variant import LevelFacts, State
from tests.variants.conftest import tiny_settings

PARENT, CHILD = expand(["nested84-hqq-g64"])


def facts(pool: VariantPool, level: str) -> LevelFacts:
    found = pool.snapshot(pool.models()[0]).level(level)
    assert found is not None
    return found


async def built(pool: VariantPool, level: str) -> None:
    model = pool.models()[0]
    await pool.request_build(model, level, reason="test")
    await pool.wait_ready(model, level, 280)
    await pool.evict(model, level)
    assert [job.state for job in pool.jobs()] == [JobState.DONE]


@asynccontextmanager
async def fake_pool(budget: int = 10**9) -> AsyncIterator[VariantPool]:
    backend = FakeBackend(Model(id="fake", fake=FakeModel(tpot_ms=0.1)), (PARENT, CHILD, "int8"))
    pool = VariantPool([backend], memory_budget=budget, max_jobs=8)
    await pool.open()
    yield pool
    await pool.close()


@pytest.mark.parametrize("level", [PARENT, CHILD])
async def test_a_build_of_either_makes_both(level: str) -> None:
    async with fake_pool() as pool:
        await built(pool, level)
        assert {facts(pool, name).state for name in (PARENT, CHILD)} == {State.STORED}
        assert facts(pool, "int8").state is State.ABSENT
        with pytest.raises(Conflict):
            await pool.request_build("fake", PARENT, reason="again")


async def test_memory_of_both_is_counted_once() -> None:
    async with fake_pool() as pool:
        await pool.warm("fake", CHILD)
        small = pool.memory_used()
        await pool.warm("fake", PARENT)
        both = pool.memory_used()
        assert small == facts(pool, CHILD).card.resident_bytes
        assert both == facts(pool, PARENT).card.resident_bytes
        assert small < both
        await pool.evict("fake", PARENT)
        assert pool.memory_used() == small


async def test_the_second_level_needs_only_the_room_that_it_adds() -> None:
    async with fake_pool() as pool:
        await pool.warm("fake", PARENT)
        room = pool.memory_used()
    async with fake_pool(room) as pool:
        await pool.warm("fake", CHILD)
        async with pool.lease("fake", CHILD, wait_s=5):
            await pool.warm("fake", PARENT)
            with pytest.raises(Overloaded):  # nothing else fits beside them
                await pool.warm("fake", "bf16")
        assert {facts(pool, name).state for name in (PARENT, CHILD)} == {State.READY}
        await pool.warm("fake", "int8")  # and room is made by unloading what frees some
        assert pool.memory_used() <= room
        assert facts(pool, PARENT).state is State.STORED


async def test_the_artifact_goes_when_no_level_of_it_is_loaded() -> None:
    async with fake_pool() as pool:
        await pool.warm("fake", PARENT)
        with pytest.raises(Conflict, match="@int8, which is ready"):
            await pool.evict("fake", CHILD, delete=True)
        await pool.evict("fake", PARENT)
        assert facts(pool, CHILD).state is State.STORED
        await pool.evict("fake", CHILD, delete=True)
        assert {facts(pool, name).state for name in (PARENT, CHILD)} == {State.ABSENT}


@pytest.mark.slow
async def test_a_real_artifact_serves_both(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, tmp_path, ("nested84-hqq-g64",))
    async with open_backends(settings) as parts:
        (backend,) = parts.backends
        assert isinstance(backend, LocalBackend)
        pool = VariantPool(parts.backends, memory_budget=10**9, max_jobs=4)
        await pool.open()
        assert [spec.level for spec in backend.ladder()] == ["bf16", PARENT, CHILD]
        await built(pool, CHILD)

        cards = {name: facts(pool, name).card for name in (PARENT, CHILD)}
        assert all(card.measured and card.decode_tokens_per_s for card in cards.values())
        assert cards[CHILD].stored_bytes == cards[PARENT].stored_bytes
        assert cards[CHILD].resident_bytes < cards[PARENT].resident_bytes
        assert cards[CHILD].kl_nats > cards[PARENT].kl_nats

        first, second = [await parts.store.fetch(backend.key(name)) for name in (PARENT, CHILD)]
        assert first is not None
        assert second is not None
        assert first.manifest.recipe == Recipe.parse(CHILD).parent.name
        whole = weights_of(first, torch.bfloat16)
        half = weights_of(second, torch.bfloat16, child=4)
        name = "model.layers.0.mlp.down_proj"
        assert half.linears[name].scheme == "grouped"
        for suffix, tensor in half.linears[name].tensors.items():
            shared = whole.linears[name].tensors[f"child.{suffix}"]
            assert tensor.data_ptr() == shared.data_ptr(), "not one memory"
        tokens = torch.randint(0, 8192, (1, 16))
        logits = [forward_logits(build_model(weights), tokens) for weights in (whole, half)]
        assert not torch.equal(logits[0], logits[1])

        await pool.warm("tiny", CHILD)
        await pool.warm("tiny", PARENT)
        assert pool.memory_used() == cards[PARENT].resident_bytes
        for level in (PARENT, CHILD):
            await pool.evict("tiny", level, delete=level == CHILD)
        assert {facts(pool, name).state for name in (PARENT, CHILD)} == {State.ABSENT}
        assert await parts.store.fetch(backend.key(PARENT)) is None
        await pool.close()
