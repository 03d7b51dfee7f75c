"""A real uvicorn server for an ASGI app: own thread, own event loop, a free port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

T = TypeVar("T")
Opener = Callable[[], AbstractAsyncContextManager[ASGIApp]]


class LiveServer:
    """Serves what `opener` yields until closed. `run` executes a coroutine in the server's loop."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._up = threading.Event()
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self.port = 0

    def __enter__(self) -> LiveServer:
        self._thread.start()
        self._up.wait(60)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._up.set()
            self._loop.close()

    async def _serve(self) -> None:
        async with self._opener() as app:
            config = uvicorn.Config(
                app,
                host="127.0.0.1",
                port=0,
                log_level="error",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=2,
            )
            self._server = uvicorn.Server(config)
            announcer = asyncio.create_task(self._announce())
            await self._server.serve()
            await announcer

    async def _announce(self) -> None:
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._up.set()
