"""A level that failed is left alone for a while, then requests may try it again."""

from __future__ import annotations

import pytest

from gateway.config import FakeModel, Model
from gateway.errors import Unavailable
from gateway.variants.entry import RETRY_FAILED_AFTER
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.pool import VariantPool
from gateway.variants.variant import State


class FailsOnce(FakeBackend):
    """Its first load of int8 breaks."""

    broken = True

    async def load(self, level: str):  # type: ignore[no-untyped-def]
        if level == "int8" and self.broken:
            self.broken = False
            raise OSError("the disk said no")
        return await super().load(level)


async def test_a_failure_is_over_after_a_while() -> None:
    now = 100.0
    backend = FailsOnce(Model(id="fake", fake=FakeModel(build_seconds=0)), ("int8",))
    pool = VariantPool([backend], memory_budget=10**9, max_jobs=4, clock=lambda: now)
    await pool.open()

    def facts() -> tuple[State, str | None]:
        level = pool.snapshot("fake").level("int8")
        assert level is not None
        return level.state, level.error

    with pytest.raises((OSError, Unavailable)):
        await pool.warm("fake", "int8")
    assert facts()[0] is State.FAILED
    with pytest.raises(Unavailable) as refused:
        await pool.warm("fake", "int8")
    assert refused.value.retry_after == RETRY_FAILED_AFTER
    now += RETRY_FAILED_AFTER
    state, error = facts()
    assert state is State.STORED  # its bytes are there: deciders may pick it
    assert error  # people still see why it failed
    await pool.warm("fake", "int8")
    assert facts() == (State.READY, None)
    await pool.close()
