"""The client: sends one request over HTTP, reads its event stream, keeps the time of every token.

It knows OpenAI's HTTP shape and nothing else; what a server adds (`compression`) is kept as it
came. It is our own thin client on aiohttp because locust's users wait for answers (no open loop)
and guidellm knows no budgets per request; aiohttp because it spends 43 µs of CPU per streamed chunk
where httpx spends 112 µs, on a machine that the server shares."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import aiohttp

from loadtest.workloads import Planned

Endpoint = Literal["chat", "completions"]
Status = Literal["ok", "refused", "error", "timeout"]

PATHS: Mapping[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
REFUSALS = (422, 429, 503)  # a budget nothing meets, full queues, not there yet: meant, not broken
MAX_EVENT_BYTES = 4 * 2**20
MAX_ERROR_TEXT = 300


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test and how to ask it.

    `body` holds extra fields for every request; without `keep_alive` each has a connection of its
    own (some servers hang up after a stream without saying so).
    """

    url: str
    model: str
    endpoint: Endpoint = "chat"
    api_key: str | None = field(default=None, repr=False)
    send_sla: bool = True
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    keep_alive: bool = True


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds on the run's clock (`time.perf_counter`).

    `intended` is when it was meant to leave, `sent` when it left. `token_times` has the arrival of
    every chunk that carried text; `completion_tokens` is the server's own count where it reports
    one, else the number of chunks.
    """

    planned: Planned
    intended: float
    sent: float
    status: Status = "error"
    finished: float = 0.0
    token_times: list[float] = field(default_factory=list)
    http_status: int | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    level: str | None = None
    compression: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return len(self.token_times) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float | None:
        """Time to first token (s) from the intended moment: what the caller waits."""
        return self.token_times[0] - self.intended if self.token_times else None

    @property
    def ttft_from_sent(self) -> float | None:
        """Time to first token (s) from the moment the request left: what the server took."""
        return self.token_times[0] - self.sent if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first (s); None below two tokens."""
        if len(self.token_times) < 2 or self.tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.tokens - 1)

    @property
    def latency(self) -> float:
        """End to end (s), from the intended moment."""
        return self.finished - self.intended


class Client:
    """One connection pool to one server; `async with` it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        headers = {"accept": "text/event-stream, application/json"}
        if self._target.api_key:
            headers["authorization"] = f"Bearer {self._target.api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, force_close=not self._target.keep_alive),
            timeout=aiohttp.ClientTimeout(total=self._target.timeout),
            read_bufsize=MAX_EVENT_BYTES,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Any]:
        """One plain JSON call: (status, decoded body). Raises: aiohttp.ClientError,
        TimeoutError."""
        async with self._open().request(method, self._target.url + path, json=body) as response:
            text = await response.text()
            try:
                return response.status, json.loads(text)
            except ValueError:
                return response.status, text[:MAX_ERROR_TEXT]

    async def send(
        self, planned: Planned, intended: float | None = None, end: float = math.inf
    ) -> Outcome:
        """Send one request and read its stream, until it ends, `Target.timeout` passes or the run's
        clock reaches `end`. Never raises for what the server does; the outcome says it.

        `intended` None: now.
        """
        body = request_body(self._target, planned)
        now = time.perf_counter()
        limit = max(0.001, min(self._target.timeout, end - now))
        outcome = Outcome(planned=planned, intended=now if intended is None else intended, sent=now)
        try:
            url = self._target.url + PATHS[self._target.endpoint]
            timeout = aiohttp.ClientTimeout(total=limit)
            async with self._open().post(url, json=body, timeout=timeout) as response:
                outcome.http_status = response.status
                outcome.level = response.headers.get("x-pressgate-level")
                if response.status == 200:
                    await _read_stream(response, outcome)
                else:
                    outcome.status = "refused" if response.status in REFUSALS else "error"
                    outcome.error = _error_text(await response.text())
        except TimeoutError:
            outcome.status, outcome.error = "timeout", f"no end within {limit:.3g} s"
        except (aiohttp.ClientError, ValueError, OSError) as error:
            outcome.status, outcome.error = "error", _describe(error)
        outcome.finished = time.perf_counter()
        return outcome

    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the client is used outside `async with`"
        return self._session


def request_body(target: Target, planned: Planned) -> dict[str, Any]:
    """The JSON body of one request."""
    body: dict[str, Any] = {
        "model": planned.traffic.model or target.model,
        "max_tokens": planned.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.body,
    }
    if target.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": planned.prompt}]
    else:
        body["prompt"] = planned.prompt
    if target.send_sla and planned.traffic.sla is not None:
        body["sla"] = planned.traffic.sla
    return body


async def calibrate(client: Client, target: Target, texts: tuple[str, str]) -> tuple[float, float]:
    """Measure how the server counts prompts: (tokens per character, tokens of overhead).

    Sends the two texts (of clearly different length) for one token each and fits a line through the
    usage it reports.

    Raises:
        LookupError: the server reports no usage, or counts that make no sense.
    """
    points = []
    for text in texts:
        body: dict[str, Any] = {"model": target.model, "max_tokens": 1, "stream": False}
        if target.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        status, answer = await client.call("POST", PATHS[target.endpoint], body)
        if status != 200 or not isinstance(answer, dict):
            raise LookupError(f"the probe was answered with {status}: {_error_text(str(answer))}")
        tokens = (answer.get("usage") or {}).get("prompt_tokens")
        if not isinstance(tokens, int):
            raise LookupError("the server reports no usage")
        points.append((len(text), tokens))
    (short, few), (long, many) = points
    slope = (many - few) / (long - short)
    if slope <= 0:
        raise LookupError("a longer prompt is not counted as more tokens")
    return slope, max(0.0, few - slope * short)


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    done = False
    async for line in response.content:
        now = time.perf_counter()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event that is no object: {data[:80]!r}")
        if event.get("error") is not None:
            outcome.error = _error_text(data.decode(errors="replace"))
            return
        _take_event(event, now, outcome)
    if done or outcome.finish_reason is not None:
        outcome.status = "ok"
    else:
        outcome.error = "the stream ended without a finish_reason"


def _take_event(event: dict[str, Any], now: float, outcome: Outcome) -> None:
    usage, compression = event.get("usage"), event.get("compression")
    if isinstance(usage, dict):
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.completion_tokens = usage.get("completion_tokens")
    if isinstance(compression, dict):
        outcome.compression = compression
        outcome.level = compression.get("level", outcome.level)
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or choice.get("text"):
            outcome.token_times.append(now)
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason


def _error_text(body: str) -> str:
    """The message of an OpenAI error body, or the beginning of whatever came."""
    try:
        return str(json.loads(body)["error"]["message"])[:MAX_ERROR_TEXT]
    except (ValueError, KeyError, TypeError):
        return body[:MAX_ERROR_TEXT]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_TEXT]
