"""A stand-in OpenAI-like server on a real port, with delays and faults that a test sets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class Behaviour:
    """What the server does. Seconds; `statuses` are answered in turn (200 after they run out)."""

    ttft: float = 0.0
    tpot: float = 0.0
    tokens_per_chunk: int = 1
    one_at_a_time: bool = False
    statuses: list[int] = field(default_factory=list)
    usage: bool = True
    compression: dict[str, Any] | None = None
    cut_after: int | None = None  # chunks before the stream just ends
    error_after: int | None = None  # chunks before an error event
    hang_after: int | None = None  # chunks before nothing comes any more
    template_tokens: int = 7
    chars_per_token: int = 5
    build_seconds: float = 1.0
    build_slows: float = 1.0  # factor on tpot while a build runs
    build_ends_as: str = "done"


class StandIn:
    """The app, and what it saw."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrivals: list[float] = []
        self.calls: list[str] = []
        self.active = 0
        self.most_active = 0
        self.url = ""
        self._lock = asyncio.Lock()
        self._builds: list[tuple[float, float]] = []

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/completions", self.generate, methods=["POST"]),
                Route("/v1/levels/{verb}", self.level, methods=["POST"]),
                Route("/v1/jobs/{id}", self.job),
            ]
        )

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.arrivals.append(time.perf_counter())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        status = self.behaviour.statuses.pop(0) if self.behaviour.statuses else 200
        if status != 200:
            return JSONResponse({"error": {"message": f"told to say {status}"}}, status)
        if not body.get("stream"):
            return JSONResponse({"choices": [], **self._usage(body, 1)})
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    def _usage(self, body: dict[str, Any], completion: int) -> dict[str, Any]:
        if not self.behaviour.usage:
            return {}
        chat = "messages" in body
        text = body["messages"][0]["content"] if chat else body["prompt"]
        prompt = len(text) // self.behaviour.chars_per_token
        prompt += self.behaviour.template_tokens if chat else 0
        return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            if self.behaviour.one_at_a_time:
                await self._lock.acquire()
            async for event in self._tokens(body):
                yield event
        finally:
            self.active -= 1
            if self.behaviour.one_at_a_time:
                self._lock.release()

    async def _tokens(self, body: dict[str, Any]) -> AsyncIterator[str]:
        does = self.behaviour
        yield ": a comment, as proxies send\n\n"
        yield _event(_choice(body, ""))
        await asyncio.sleep(does.ttft)
        chunks = -(-body["max_tokens"] // does.tokens_per_chunk)
        for index in range(chunks):
            if index:
                await asyncio.sleep(does.tpot * does.tokens_per_chunk * self._slowness())
            if index == does.cut_after:
                return
            if index == does.error_after:
                yield _event({"error": {"message": "the engine died"}})
                return
            if index == does.hang_after:
                await asyncio.sleep(3600)
            yield _event(_choice(body, "é " * does.tokens_per_chunk))
        yield _event(_choice(body, "", "length"))
        last: dict[str, Any] = {"choices": [], **self._usage(body, body["max_tokens"])}
        if does.compression is not None:
            last["compression"] = does.compression
        yield _event(last)
        yield "data: [DONE]\n\n"

    def _slowness(self) -> float:
        now = time.perf_counter()
        busy = any(begin <= now < end for begin, end in self._builds)
        return self.behaviour.build_slows if busy else 1.0

    async def level(self, request: Request) -> Response:
        self.calls.append(request.path_params["verb"] + "?" + request.url.query)
        if not request.path_params["verb"].endswith(":build"):
            return JSONResponse({})
        now = time.perf_counter()
        self._builds.append((now, now + self.behaviour.build_seconds))
        return JSONResponse({"id": f"job-{len(self._builds) - 1}", "state": "queued"}, 202)

    async def job(self, request: Request) -> Response:
        begin, end = self._builds[int(request.path_params["id"].removeprefix("job-"))]
        ended = time.perf_counter() >= end
        state = self.behaviour.build_ends_as if ended else "running"
        return JSONResponse({"state": state, "build_seconds": end - begin, "error": "told to"})


def _choice(body: dict[str, Any], text: str, finish: str | None = None) -> dict[str, Any]:
    part: dict[str, Any] = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return {"choices": [{"index": 0, "finish_reason": finish, **part}]}


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[StandIn]:
    """Run a stand-in on a free loopback port, in a thread with its own event loop."""
    standin = StandIn(behaviour)
    config = uvicorn.Config(
        standin.app(), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise RuntimeError("the stand-in did not start")
        time.sleep(0.01)
    standin.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield standin
    finally:
        server.should_exit = True
        thread.join(timeout=10)
