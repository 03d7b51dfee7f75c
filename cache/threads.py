"""Blocking work in a thread, and tasks, without leaving them behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

_AGAIN_SECONDS = 0.5

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread`, except that a cancelled caller waits until the thread is done.

    So whoever cleans up after a cancellation (closing a file, removing a folder) never does it
    under the feet of a thread that still works there.
    """
    task = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        task.exception()  # seen; the cancellation is what the caller gets
        raise


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is done; cancel it again where that got lost.

    In redis-py that happens: of tasks cancelled in the middle of a command, a few in a thousand go
    on, or take it for a connection that the server closed and try again.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_SECONDS)
    with suppress(asyncio.CancelledError):
        await task
