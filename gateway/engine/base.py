"""The engine protocol and its nouns. Torch-free: the HTTP process imports this and nothing heavier.

A request's life is one `GenerationRequest` in and a stream of `TokenEvent` out. Whoever stops
iterating (`aclose`, cancellation, an exception) cancels the sequence and frees its KV blocks; there
is no other cancel call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens; already validated and bounded by the API layer.

    `temperature == 0` is greedy. `top_k == 0` means off. `logprobs` is the number of alternatives
    to report per token (0 reports the chosen token only), None reports nothing. `json_schema` is
    the text of a JSON schema the output must match (`"{}"`: any JSON object). `seed` makes the
    sequence reproducible whatever else runs in the batch.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: str | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. `prompt` is never empty and leaves room for `max_tokens`.

    `prompt_logprobs`: also score the prompt (OpenAI `echo` + `logprobs`); the scores come on the
    first event. `context`: headers of the W3C trace context, for another server to go on with.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    prompt_logprobs: bool = False
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats) of one token under the model's raw distribution, with alternatives.

    `top` holds (token id, text, logprob), best first.
    """

    token: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. The last event of a sequence has `finish_reason` set.

    Attributes:
        text: newly complete text, always whole UTF-8 characters; may be empty (partial character,
            or text held back because it may be the beginning of a stop string).
        token: the id sampled, or None for an event that only flushes held-back text.
        cached_tokens: prompt tokens taken from the prefix cache (on the first event).
        prompt_logprobs: one entry per prompt token, the first with `logprob=None`; on the first
            event only.
    """

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What one engine (one variant) does now; a consistent snapshot.

    `waiting_prompt_tokens`: prompt tokens not yet prefilled, of waiting and running sequences.
    `remaining_tokens`: tokens still to generate at most, over running and waiting sequences.
    `drafted_tokens`, `accepted_tokens`: proposed by speculation so far, and kept of them.
    """

    running: int = 0
    waiting: int = 0
    waiting_prompt_tokens: int = 0
    remaining_tokens: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class TextCodec(Protocol):
    """Between text and token ids, for one model. Cheap calls; safe from any thread."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt of a conversation, ready for the assistant's answer.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages.
        """
        ...


class Engine(Protocol):
    """One ready variant. Cheap to hold; all state lives behind it."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Generate until a stop, `max_tokens` or cancellation (closing the iterator).

        Raises:
            EngineOverloaded: the engine's waiting queue is full.
            BadPrompt, BadSchema: this request can never be served as it is.
            SequenceFailed: this sequence is lost; the engine goes on.
            EngineFailed: the engine is gone, and all its sequences with it.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """Stop the engine's sequences and free its memory. Idempotent."""
        ...


@runtime_checkable
class Movable(Protocol):
    """An engine whose sequences another level of the same model may go on with."""

    async def move(self, request_id: str, target: Engine) -> int | None:
        """Let `target` compute the tokens of a running sequence from the next one on; its events
        keep coming where they came.

        Returns: how many tokens the answer has at that boundary; None when it cannot move: it is
        over or not yet begun, `target` has no free place, or keeps keys and values differently.
        """
        ...


class EngineError(Exception):
    """Base of what an engine may raise while generating."""


class EngineOverloaded(EngineError):
    """The waiting queue is full."""


class EngineFailed(EngineError):
    """The engine itself is gone (closed, its thread or worker died, upstream unreachable).

    Whoever holds the engine closes it for everyone: never raise this for one request's fault.
    """


class SequenceFailed(EngineError):
    """This sequence is lost; the engine goes on."""


class BadPrompt(EngineError):
    """The caller's fault: this engine can never serve the request; the message says why.

    `param` is the field of `/v1/completions` at fault, the prompt unless told otherwise.
    """

    def __init__(self, message: str, *, param: str = "prompt") -> None:
        super().__init__(message)
        self.param = param


class BadSchema(EngineError):
    """`json_schema` cannot be compiled to a grammar; the message says why."""
