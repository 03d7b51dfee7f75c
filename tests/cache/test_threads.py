"""Threads are not left behind by a cancellation."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cache.threads import in_thread
from tests.cache.samples import until


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_waits_for_its_thread(fails: bool) -> None:
    started, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go.wait(20)
        ended.set()
        if fails:
            raise ValueError

    caller = asyncio.create_task(in_thread(work))
    await until(started.is_set)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0.01)
        assert not caller.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


async def test_results_and_errors_pass_through() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)
