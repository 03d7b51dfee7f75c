"""Several generations as one stream of events. Owns the tasks it starts and leaves none behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from gateway.engine.base import Engine, GenerationRequest, TokenEvent


async def merged(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """(index of the request, event) in order of arrival; all sequences run at the same time.

    The first error of any sequence cancels the others and is raised. Closing cancels all.
    """
    if len(requests) == 1:
        async with _closing(engine.generate(requests[0])) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_pump(engine, index, request, queue))
        for index, request in enumerate(requests)
    ]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    engine: Engine,
    index: int,
    request: GenerationRequest,
    queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]],
) -> None:
    try:
        async with _closing(engine.generate(request)) as events:
            async for event in events:
                queue.put_nowait((index, event))
    except Exception as error:
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))


@asynccontextmanager
async def _closing(events: AsyncIterator[TokenEvent]) -> AsyncIterator[AsyncIterator[TokenEvent]]:
    """Close a generator at once, not when it is collected: that is what cancels a sequence."""
    try:
        yield events
    finally:
        if (aclose := getattr(events, "aclose", None)) is not None:
            await aclose()
