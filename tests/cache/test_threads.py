"""Threads are not left behind by a cancellation."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cache.threads import ended, in_thread
from tests.cache.samples import until


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_waits_for_its_thread(fails: bool) -> None:
    started, go, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go.wait(20)
        over.set()
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
    assert over.is_set()


async def test_results_and_errors_pass_through() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed += 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await ended(task)
    assert task.cancelled()
    assert swallowed == 1


async def test_ending_a_task_that_failed_says_so() -> None:
    async def fails() -> None:
        raise LookupError("mine")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    with pytest.raises(LookupError, match="mine"):
        await ended(task)
