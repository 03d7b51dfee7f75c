"""OpenAI's answer shapes, whole and as server-sent events. Formatting only: no engine, no I/O.

A plain token costs one `orjson.dumps` of its text between two prebuilt byte strings.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Protocol

import orjson

from gateway.engine.base import TokenEvent, TokenLogprob
from gateway.errors import PressgateError

DONE = b"data: [DONE]\n\n"
_LOWEST = -9999.0  # JSON has no -inf


@dataclass(slots=True)
class Choice:
    """One sequence as it grows. Times are `time.perf_counter()` seconds."""

    index: int
    echo: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None

    def add(self, event: TokenEvent) -> None:
        if event.token is not None:
            self.last_at = time.perf_counter()
            if self.first_at is None:
                self.first_at = self.last_at
            self.ids.append(event.token)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason

    def keep(self, event: TokenEvent) -> None:
        """Also keep the text and the logprobs, for an answer in one piece."""
        self.add(event)
        self.parts.append(event.text)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)

    def mute(self) -> None:
        """Forget the one token that was generated only to have the prompt scored."""
        self.parts, self.logprobs, self.ids = [], [], []
        self.finish_reason = "length"

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return len(self.ids)

    @property
    def text(self) -> str:
        return "".join(self.parts)


def usage(prompt_tokens: int, cached: int, generated: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_event(error: PressgateError) -> bytes:
    return b"data: " + orjson.dumps(error.body()) + b"\n\n"


class Shape(Protocol):
    """How one endpoint writes its answers."""

    def opening(self, choice: Choice) -> bytes:
        """What a stream sends for a choice as soon as its first event is there."""
        ...

    def chunk(self, choice: Choice, event: TokenEvent, extra: Mapping[str, Any] | None) -> bytes:
        """One event of a stream; `extra` is merged into the chunk."""
        ...

    def closing(self, extra: Mapping[str, Any]) -> bytes:
        """The chunk without choices that carries the usage."""
        ...

    def whole(self, choices: Sequence[Choice], extra: Mapping[str, Any]) -> bytes: ...


class _Base(ABC):
    """Identity of one answer and the parts that both endpoints share."""

    prefix: str
    chunk_object: str
    whole_object: str

    def __init__(self, model: str, n: int, include_usage: bool) -> None:
        self.id = f"{self.prefix}-{token_hex(16)}"
        self._head = {"id": self.id, "object": "", "created": int(time.time()), "model": model}
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}
        self._frames: list[tuple[bytes, bytes] | None] = [None] * n

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text of a plain chunk."""
        frame = self._frames[index]
        if frame is None:
            marker = "\u0001"
            chunk = self._chunk([self._plain(index, marker)], None)
            before, _, after = chunk.partition(orjson.dumps(marker))
            frame = self._frames[index] = (before, after)
        return frame

    @abstractmethod
    def _plain(self, index: int, text: str) -> dict[str, Any]:
        """The choice of a chunk that carries text and nothing else."""

    def _chunk(self, choices: list[dict[str, Any]], extra: Mapping[str, Any] | None) -> bytes:
        body = self._head | {"object": self.chunk_object, "choices": choices} | self._tail
        return b"data: " + orjson.dumps(body | dict(extra) if extra else body) + b"\n\n"

    def closing(self, extra: Mapping[str, Any]) -> bytes:
        return self._chunk([], extra)

    def _whole(self, choices: list[dict[str, Any]], extra: Mapping[str, Any]) -> bytes:
        body = self._head | {"object": self.whole_object, "choices": choices}
        return orjson.dumps(body | dict(extra))


class ChatShape(_Base):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _plain(self, index: int, text: str) -> dict[str, Any]:
        delta = {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def opening(self, choice: Choice) -> bytes:
        delta = {"role": "assistant", "content": ""}
        entry = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([entry], None)

    def chunk(self, choice: Choice, event: TokenEvent, extra: Mapping[str, Any] | None) -> bytes:
        if event.logprob is None and event.finish_reason is None and extra is None:
            before, after = self._frame(choice.index)
            return before + orjson.dumps(event.text) + after
        scored = [event.logprob] if event.logprob is not None else []
        entry = {
            "index": choice.index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": _chat_logprobs(scored) if scored else None,
            "finish_reason": event.finish_reason,
        }
        return self._chunk([entry], extra)

    def whole(self, choices: Sequence[Choice], extra: Mapping[str, Any]) -> bytes:
        entries = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _chat_logprobs(choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._whole(entries, extra)


class TextShape(_Base):
    """`text_completion`, whole and chunks (OpenAI gives both the same object name)."""

    prefix = "cmpl"
    chunk_object = whole_object = "text_completion"

    def __init__(self, model: str, n: int, include_usage: bool) -> None:
        super().__init__(model, n, include_usage)
        self._offsets = [0] * n

    def _plain(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def opening(self, choice: Choice) -> bytes:
        """The echoed prompt with its scores, if one is asked for."""
        if not choice.echo:
            return b""
        entry = self._plain(choice.index, choice.echo)
        if choice.prompt_logprobs:
            entry["logprobs"] = self._scores(choice.index, choice.prompt_logprobs)
        self._offsets[choice.index] = len(choice.echo)
        return self._chunk([entry], None)

    def chunk(self, choice: Choice, event: TokenEvent, extra: Mapping[str, Any] | None) -> bytes:
        if event.logprob is None and event.finish_reason is None and extra is None:
            before, after = self._frame(choice.index)
            return before + orjson.dumps(event.text) + after
        entry = self._plain(choice.index, event.text) | {"finish_reason": event.finish_reason}
        if event.logprob is not None:
            entry["logprobs"] = self._scores(choice.index, (event.logprob,))
        return self._chunk([entry], extra)

    def whole(self, choices: Sequence[Choice], extra: Mapping[str, Any]) -> bytes:
        entries = []
        for choice in choices:
            entry = self._plain(choice.index, choice.echo + choice.text)
            entry["finish_reason"] = choice.finish_reason
            scored = (*choice.prompt_logprobs, *choice.logprobs)
            if scored:
                if choice.echo and not choice.prompt_logprobs:
                    self._offsets[choice.index] = len(choice.echo)
                entry["logprobs"] = self._scores(choice.index, scored)
            entries.append(entry)
        return self._whole(entries, extra)

    def _scores(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The completions API's parallel lists; `text_offset` counts characters from the start."""
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry.text)
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [_nats(entry.logprob) for entry in entries],
            "top_logprobs": [_tops(entry) for entry in entries],
            "text_offset": offsets,
        }


def _nats(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)


def _tops(entry: TokenLogprob) -> dict[str, float] | None:
    """Alternatives by text, best first; the chosen token is always among them."""
    if entry.logprob is None:
        return None
    tops: dict[str, float] = {}
    for _, text, logprob in entry.top:
        tops.setdefault(text, max(logprob, _LOWEST))
    tops.setdefault(entry.text, max(entry.logprob, _LOWEST))
    return tops


def _chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            _scored(entry.text, entry.logprob)
            | {"top_logprobs": [_scored(text, logprob) for _, text, logprob in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _scored(text: str, logprob: float | None) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": _nats(logprob) or 0.0,
        "bytes": list(text.encode("utf-8", errors="replace")),
    }
