"""The HTTP server's end: a signal asks for it, requests in flight get some time, status 0.

uvicorn alone ends by raising the signal again, which skips whatever is still to be closed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.applications import Starlette

_GRACE_S = 10.0  # for requests in flight
_LAST_WORDS_S = 5  # for telling those that are still there


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM; a second signal does not wait for requests.

    Args:
        stop_generating: ends every generation under way, so that its caller is told; called when
            the grace time is over.
    """

    def __init__(self, app: Starlette, stop_generating: Callable[[], Awaitable[None]]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=int(_GRACE_S) + _LAST_WORDS_S,
            )
        )
        self._stop_generating = stop_generating

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_generations())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_generations(self) -> None:
        await asyncio.sleep(_GRACE_S)
        await self._stop_generating()
