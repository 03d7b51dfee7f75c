"""A stand-in engine with settable speed: for tests, and for measuring the gateway without a model.

Deterministic: the text depends on the prompt, the seed and nothing else. Owns no memory, imports no
torch, and must never be offered as a level of a real model.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from gateway.engine.base import (
    Engine,
    EngineFailed,
    EngineOverloaded,
    EngineStats,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

_BLOCK = 16
_WORDS = (
    " the",
    " press",
    " gate",
    " weighs",
    " every",
    " level",
    " and",
    " picks",
    " one",
    ",",
    " so",
    " naïve",
    " déjà",
    " été",
    " 語",
    " 🗜",
    " fits",
    " its",
    " budget",
    ".",
    "\n",
    " fast",
    " small",
    " good",
)
_WORD_BASE = 256
_JSON = ("{", '"answer"', ":", '"fake"', "}")
_JSON_BASE = _WORD_BASE + len(_WORDS)
_EOS = _JSON_BASE + len(_JSON)

Fault = Callable[[GenerationRequest, int], Exception | None]
"""Called before each token with (request, tokens generated so far); what it returns is raised."""


class FakeTokenizer:
    """UTF-8 bytes are ids 0..255; the fake engine's own words follow, then the end token."""

    vocab_size = _EOS + 1
    eos = _EOS

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte; lone surrogates become `?`."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        out = bytearray()
        for token in ids:
            out += self.piece(token)
        return out.decode("utf-8", errors="replace")

    def piece(self, token: int) -> bytes:
        """The bytes of one token; nothing for ids out of range."""
        if 0 <= token < _WORD_BASE:
            return bytes((token,))
        if _WORD_BASE <= token < _EOS:
            return (_WORDS + _JSON)[token - _WORD_BASE].encode()
        return b""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """`role: content` lines and an opening for the answer."""
        lines = [f"{m['role']}: {m['content']}\n" for m in messages]
        return self.encode("".join(lines) + "assistant:")


@dataclass(frozen=True, slots=True)
class FakeSpeed:
    """How fast the stand-in is. `slowdown`: extra share of `tpot_ms` per other running sequence.

    `eos_after` ends every sequence with "stop" after that many tokens (0: never).
    """

    prefill_tokens_per_s: float = 10_000.0
    tpot_ms: float = 5.0
    slowdown: float = 0.0
    max_running: int = 64
    max_waiting: int = 256
    eos_after: int = 0


@dataclass(slots=True)
class _Sequence:
    request: GenerationRequest
    engine: FakeEngine
    prefilled: bool = False
    generated: int = 0

    @property
    def blocks(self) -> int:
        return math.ceil((len(self.request.prompt) + self.generated) / _BLOCK)


class FakeEngine:
    """`Engine` over a clock: prefill one prompt at a time, then a token every `tpot_ms`."""

    def __init__(self, speed: FakeSpeed | None = None, fault: Fault | None = None) -> None:
        self.speed = speed or FakeSpeed()
        self.fault = fault
        self._tokenizer = FakeTokenizer()
        self._idle = EngineStats(kv_total_blocks=self.speed.max_running * 256)
        self._slots = asyncio.Semaphore(self.speed.max_running)
        self._prefill = asyncio.Lock()
        self._waiting: dict[int, _Sequence] = {}
        self._running: dict[int, _Sequence] = {}
        self._closed = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if self._closed:
            raise EngineFailed("the engine is closed")
        if len(self._waiting) >= self.speed.max_waiting:
            raise EngineOverloaded(f"{len(self._waiting)} sequences wait already")
        sequence = _Sequence(request, self)
        key = id(sequence)
        self._waiting[key] = sequence
        try:
            async with self._slots:
                self._running[key] = self._waiting.pop(key)
                async with self._prefill:
                    await self._sleep(len(request.prompt) / self.speed.prefill_tokens_per_s)
                sequence.prefilled = True
                async for event in self._decode(sequence):
                    yield event
        finally:
            self._waiting.pop(key, None)
            sequence.engine._running.pop(key, None)

    async def move(self, request_id: str, target: Engine) -> int | None:
        """See `Movable.move`; from then on a token takes as long as at `target`."""
        found = ((k, s) for k, s in self._running.items() if s.request.id == request_id)
        key, sequence = next(found, (0, None))
        if sequence is None or not sequence.prefilled or not isinstance(target, FakeEngine):
            return None
        if target is self or len(target._running) >= target.speed.max_running:
            return None
        target._running[key] = self._running.pop(key)
        sequence.engine = target
        return sequence.generated

    def stats(self) -> EngineStats:
        if not self._running and not self._waiting:
            return self._idle
        alive = [*self._waiting.values(), *self._running.values()]
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_prompt_tokens=sum(len(s.request.prompt) for s in alive if not s.prefilled),
            remaining_tokens=sum(s.request.sampling.max_tokens - s.generated for s in alive),
            kv_used_blocks=sum(s.blocks for s in self._running.values()),
            kv_total_blocks=self.speed.max_running * 256,
        )

    async def close(self) -> None:
        self._closed = True

    async def _decode(self, sequence: _Sequence) -> AsyncIterator[TokenEvent]:
        request, sampling = sequence.request, sequence.request.sampling
        text = StopFilter(sampling.stop)
        due = time.monotonic()
        for count, token in enumerate(self._tokens(request), 1):
            if sequence.engine._closed:
                raise EngineFailed("the engine was closed")
            if self.fault and (error := self.fault(request, count - 1)):
                raise error
            due += sequence.engine._step_seconds()
            await self._sleep(due - time.monotonic())
            sequence.generated = count
            out, stopped = text.push(self._tokenizer.decode((token,)))
            ended = stopped or token == _EOS
            finished = ended or count == sampling.max_tokens
            if finished and not stopped:
                out += text.flush()
            yield TokenEvent(
                text=out,
                token=token,
                logprob=self._logprob(token, sampling),
                finish_reason=("stop" if ended else "length") if finished else None,
                prompt_logprobs=self._score(request) if count == 1 else None,
            )
            if finished:
                return

    def _step_seconds(self) -> float:
        others = len(self._running) - 1
        return self.speed.tpot_ms / 1000.0 * (1.0 + self.speed.slowdown * others)

    def _tokens(self, request: GenerationRequest) -> Iterable[int]:
        """The ids to emit; endless unless the spec or a schema ends them."""
        sampling = request.sampling
        if sampling.json_schema is not None:
            yield from range(_JSON_BASE, _JSON_BASE + len(_JSON))
            yield _EOS
            return
        seed = crc32(repr(request.prompt).encode())
        if sampling.temperature > 0:
            seed += 7919 * (sampling.seed or 0)
        rng = random.Random(seed)  # noqa: S311 - not for secrets
        count = 0
        while True:
            count += 1
            if self.speed.eos_after and count > self.speed.eos_after and not sampling.ignore_eos:
                yield _EOS
                return
            yield _WORD_BASE + rng.randrange(len(_WORDS))

    def _score(self, request: GenerationRequest) -> tuple[TokenLogprob, ...] | None:
        if not request.prompt_logprobs:
            return None
        scored = [self._logprob(token, request.sampling) for token in request.prompt]
        first = TokenLogprob(
            request.prompt[0], self._tokenizer.decode(request.prompt[:1]), logprob=None
        )
        return (first, *[entry for entry in scored[1:] if entry is not None])

    def _logprob(self, token: int, sampling: SamplingParams) -> TokenLogprob | None:
        """Made-up but steady: the chosen token gets -0.1, alternatives fall by one nat each."""
        if sampling.logprobs is None:
            return None
        others = [(token + step) % _JSON_BASE for step in range(1, sampling.logprobs)]
        ranked = [token, *others][: sampling.logprobs]
        return TokenLogprob(
            token=token,
            text=self._tokenizer.decode((token,)),
            logprob=-0.1,
            top=tuple(
                (t, self._tokenizer.decode((t,)), -0.1 - rank) for rank, t in enumerate(ranked)
            ),
        )

    @staticmethod
    async def _sleep(seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class StopFilter:
    """Holds back text that may begin a stop string; cuts at the first whole one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what may be shown now, and whether a stop string was met."""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            out, self._held = self._held[: min(hits)], ""
            return out, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
