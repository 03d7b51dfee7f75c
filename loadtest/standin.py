"""An OpenAI-compatible server that answers at once with words that mean nothing: what gateways are
measured in front of, so that nothing but the gateway takes time.

`python -m loadtest.standin PORT`. It never leaves the loopback.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
import uvicorn

from loadtest.client import PATHS

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_TOKENS = 4096
_WORD = "word "
_MODELS = orjson.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]})


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Pure ASGI, because it must cost less than any gateway does."""
    if scope["type"] != "http":
        return
    if scope["path"] not in PATHS.values():
        await _send_json(send, _MODELS)
        return
    raw, more = b"", True
    while more:
        message = await receive()
        raw += message.get("body", b"")
        more = message.get("more_body", False)
    body = orjson.loads(raw)
    chat = scope["path"] == PATHS["chat"]
    count = min(MAX_TOKENS, int(body.get("max_tokens") or body.get("max_completion_tokens") or 16))
    usage = {"prompt_tokens": 8, "completion_tokens": count, "total_tokens": 8 + count}
    if not body.get("stream"):
        text = _WORD * count
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, "finish_reason": "length", "logprobs": None, **said}
        await _send_json(send, _body(chat, "chat.completion", [choice], usage))
        return
    await send(_start(b"text/event-stream"))
    word = _event(_body(chat, "chat.completion.chunk", [_piece(chat, _WORD, None)], None))
    for _ in range(count):
        await send({"type": "http.response.body", "body": word, "more_body": True})
    end = _event(_body(chat, "chat.completion.chunk", [_piece(chat, "", "length")], None))
    end += _event(_body(chat, "chat.completion.chunk", [], usage)) + b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": end, "more_body": False})


def _piece(chat: bool, text: str, finish: str | None) -> Message:
    said: Message = {"delta": {"content": text} if text else {}} if chat else {"text": text}
    return {"index": 0, "finish_reason": finish, "logprobs": None, **said}


def _body(chat: bool, kind: str, choices: Sequence[Message], usage: Message | None) -> bytes:
    return orjson.dumps(
        {
            "id": "standin",
            "object": kind if chat else "text_completion",
            "created": 0,
            "model": "fake",
            "choices": choices,
            "usage": usage,
        }
    )


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _start(kind: bytes, length: int | None = None) -> Message:
    headers = [(b"content-type", kind)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def _send_json(send: Send, data: bytes) -> None:
    await send(_start(b"application/json", len(data)))
    await send({"type": "http.response.body", "body": data, "more_body": False})


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
