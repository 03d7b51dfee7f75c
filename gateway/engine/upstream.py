"""A level that lives in another OpenAI-compatible server (vLLM, SGLang, llama.cpp, TGI, Pressgate).

Speaks streaming `POST /v1/completions`, which takes token ids and so keeps our chat template and
token counts. Owns one HTTP connection pool; closing a generator closes its stream, which is how the
server learns that the caller left.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NoReturn

import httpx
import orjson

from gateway.engine.base import (
    BadPrompt,
    EngineFailed,
    EngineOverloaded,
    EngineStats,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceFailed,
    TokenEvent,
    TokenLogprob,
)

UNKNOWN_TOKEN = -1
"""Id of a token whose text is known and whose id the upstream did not tell."""

_MAX_ERROR = 300
_CALLER_FAULT = frozenset({400, 422})
_OURS = frozenset({"model", "stream", "stream_options"})  # fields that no caller decides


class UpstreamEngine:
    """`Engine` over HTTP. With `decode`, prompts go as text (the server has another tokenizer)."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """
        Args:
            url: the server's root, with or without `/v1`.
            timeout_s: longest silence between two tokens, seconds.
        """
        root = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            base_url=root,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self._model = model
        self._decode = decode
        self._alive: dict[int, list[int]] = {}  # per sequence: prompt tokens unread, tokens left

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Generate; see `Engine.generate`.

        Raises:
            BadPrompt: the server calls the request wrong. EngineOverloaded: it says 429 or 503.
            SequenceFailed: any other bad answer. EngineFailed: closed, or nobody to connect to.
        """
        if self._client.is_closed:
            raise EngineFailed("the engine is closed")
        state = [len(request.prompt), request.sampling.max_tokens]
        self._alive[id(state)] = state
        events = self._scored(request) if request.prompt_logprobs else self._streamed(request)
        try:
            async for event in events:
                state[0] = 0
                state[1] -= event.token is not None
                yield event
        except httpx.HTTPError as error:
            gone = self._client.is_closed or isinstance(
                error, httpx.ConnectError | httpx.ConnectTimeout
            )
            failure = EngineFailed if gone else SequenceFailed
            raise failure(f"upstream: {type(error).__name__}: {error}") from error
        finally:
            del self._alive[id(state)]
            await events.aclose()

    def stats(self) -> EngineStats:
        """What we sent and have not got back; the server's own load is not visible."""
        return EngineStats(
            running=sum(1 for unread, _ in self._alive.values() if not unread),
            waiting=sum(1 for unread, _ in self._alive.values() if unread),
            waiting_prompt_tokens=sum(unread for unread, _ in self._alive.values()),
            remaining_tokens=sum(max(0, left) for _, left in self._alive.values()),
        )

    async def close(self) -> None:
        await self._client.aclose()

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        prompt = request.prompt
        return {
            "model": self._model,
            "prompt": self._decode(prompt) if self._decode else list(prompt),
            **_sampling_fields(request.sampling),
        }

    async def _streamed(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        body = self._body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        counted, finish = 0, None
        usage: dict[str, Any] = {}
        async with self._client.stream(
            "POST", "/v1/completions", json=body, headers=dict(request.context)
        ) as response:
            if response.status_code != 200:
                await response.aread()
                _refuse(response, body)
            async for chunk in _sse(response):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    finish = choice.get("finish_reason") or finish
                    for event in _chunk_events(choice):
                        counted += event.token is not None
                        yield event
        if finish is None:
            raise SequenceFailed("upstream ended the stream without a finish_reason")
        # A server may put several tokens into one chunk: its own count, sent last, settles it.
        for _ in range(int(usage.get("completion_tokens") or counted) - counted):
            yield TokenEvent(text="", token=UNKNOWN_TOKEN)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        yield TokenEvent(text="", finish_reason=_finish(finish), cached_tokens=cached)

    async def _scored(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Prompt scores come with `echo`, and all at once."""
        body = self._body(request) | {"echo": True}
        response = await self._client.post(
            "/v1/completions", json=body, headers=dict(request.context)
        )
        if response.status_code != 200:
            _refuse(response, body)
        try:
            choice = response.json()["choices"][0]
            entries = _logprobs(choice["logprobs"])
        except (ValueError, LookupError, TypeError) as error:
            raise SequenceFailed("upstream answered without echoed logprobs") from error
        size = len(request.prompt)
        scored = tuple(
            TokenLogprob(token, entry.text, entry.logprob, entry.top)
            for token, entry in zip(request.prompt, entries[:size], strict=False)
        )
        if len(scored) != size:
            raise SequenceFailed(f"upstream scored {len(scored)} of {size} prompt tokens")
        for index, entry in enumerate(entries[size:]):
            yield TokenEvent(
                text=entry.text,
                token=entry.token,
                logprob=entry,
                prompt_logprobs=scored if index == 0 else None,
            )
        only_prompt = scored if len(entries) == size else None
        yield TokenEvent(
            text="",
            finish_reason=_finish(choice.get("finish_reason")),
            prompt_logprobs=only_prompt,
        )


def _sampling_fields(sampling: SamplingParams) -> dict[str, Any]:
    """Standard fields always; extensions only when set (strict servers refuse them)."""
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    extras: dict[str, tuple[Any, Any]] = {
        "top_k": (sampling.top_k, 0),
        "min_p": (sampling.min_p, 0.0),
        "seed": (sampling.seed, None),
        "stop": (list(sampling.stop), []),
        "logprobs": (sampling.logprobs, None),
        "presence_penalty": (sampling.presence_penalty, 0.0),
        "frequency_penalty": (sampling.frequency_penalty, 0.0),
        "repetition_penalty": (sampling.repetition_penalty, 1.0),
        "logit_bias": ({str(k): v for k, v in sampling.logit_bias.items()}, {}),
        "ignore_eos": (sampling.ignore_eos, False),
    }
    fields |= {name: value for name, (value, neutral) in extras.items() if value != neutral}
    if sampling.json_schema is not None:
        schema = orjson.loads(sampling.json_schema)
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        }
    return fields


async def _sse(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an event stream up to `[DONE]`; an error object is raised.

    Lines are cut here, out of bytes: a server may send many tokens in one packet, and httpx's own
    lines also end where a text holds one of Unicode's line separators.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            chunk = _event(line)
            if chunk is None:
                return
            if chunk:
                yield chunk
    if chunk := _event(rest):  # a last line without an end
        yield chunk


def _event(line: bytes) -> dict[str, Any] | None:
    """The object in a line of an event stream; empty when it holds none, None at the end."""
    if not line.startswith(b"data:"):
        return {}
    data = line[5:].strip()
    if data == b"[DONE]":
        return None
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise SequenceFailed("upstream sent an event that is not JSON") from error
    if not isinstance(chunk, dict):
        raise SequenceFailed("upstream sent an event that is not an object")
    if error_body := chunk.get("error"):
        raise SequenceFailed(f"upstream: {_message(error_body)}")
    return chunk


def _chunk_events(choice: Mapping[str, Any]) -> list[TokenEvent]:
    """One event per token told with logprobs, else one for the chunk's text."""
    text = choice.get("text") or ""
    entries = _logprobs(choice["logprobs"]) if choice.get("logprobs") else []
    if not entries:
        return [TokenEvent(text=text, token=UNKNOWN_TOKEN)] if text else []
    return [
        TokenEvent(text=text if index == 0 else "", token=entry.token, logprob=entry)
        for index, entry in enumerate(entries)
    ]


def _logprobs(block: Mapping[str, Any]) -> list[TokenLogprob]:
    """The completions API's parallel lists as entries."""
    tops = block.get("top_logprobs") or [None] * len(block["tokens"])
    return [
        TokenLogprob(
            token=UNKNOWN_TOKEN,
            text=text,
            logprob=logprob,
            top=tuple((UNKNOWN_TOKEN, word, value) for word, value in (top or {}).items()),
        )
        for text, logprob, top in zip(block["tokens"], block["token_logprobs"], tops, strict=False)
    ]


def _finish(reason: object) -> FinishReason:
    return "length" if reason == "length" else "stop"


def _message(body: object) -> str:
    if isinstance(body, dict):
        body = body.get("message") or body
    return str(body)[:_MAX_ERROR]


def _refuse(response: httpx.Response, sent: Mapping[str, Any]) -> NoReturn:
    """Turn a refusal of the body `sent` into an error.

    Raises:
        EngineOverloaded: the server says 429 or 503. BadPrompt: 400 or 422.
        SequenceFailed: anything else.
    """
    param = None
    try:
        answer = response.json()
        error = answer.get("error", answer) if isinstance(answer, dict) else answer
        detail = _message(error)
        param = error.get("param") if isinstance(error, dict) else None
    except ValueError:
        detail = response.text[:_MAX_ERROR]
    message = f"upstream answered {response.status_code}: {detail}"
    if response.status_code in (429, 503):
        raise EngineOverloaded(message)
    named = param if isinstance(param, str) and param in sent else "prompt"
    if response.status_code in _CALLER_FAULT and named not in _OURS:
        raise BadPrompt(message, param=named)
    raise SequenceFailed(message)
