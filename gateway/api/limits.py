"""Bounds what a caller may send, as pure ASGI middleware: declared or chunked. Buffers nothing."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.problems import send_error
from gateway.errors import BodyTooLarge


class BodyLimitMiddleware:
    """Answers 413 to a declared length over the limit; cuts off a chunked body that passes it.

    The second case raises `BodyTooLarge` out of `receive`, inside whoever reads the body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if int(declared) > self._max:
            await send_error(send, self._error())
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max:
                    raise self._error()
            return message

        await self._app(scope, bounded, send)

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._max} bytes", param="body")
