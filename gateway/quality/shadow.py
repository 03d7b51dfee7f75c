"""Live quality: the dense level re-scores a sample of what compressed levels answered.

A card says what a level did to held-out text; this says what it does to the operator's own traffic.
Scoring runs behind the requests, one answer at a time, through the dense level's ordinary queue;
when it falls behind, samples are dropped. Texts are never kept or logged.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

from gateway.engine.base import Engine, EngineError, GenerationRequest, SamplingParams
from gateway.errors import PressgateError

log = logging.getLogger(__name__)

_QUEUE = 16  # answers waiting to be scored
_MAX_TOKENS = 1024  # of prompt and answer together; longer ones are left out

Lease = Callable[[str], AbstractAsyncContextManager[Engine]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a compressed level: token ids of the prompt and of what was generated."""

    model: str
    level: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What the dense level says of an answer.

    Attributes:
        agreeing: tokens that are dense's most likely one.
        nll_nats: their summed negative log-likelihood under dense; exp(nll / tokens) is the
            perplexity of the answer as dense sees it.
    """

    tokens: int
    agreeing: int
    nll_nats: float


async def score(engine: Engine, answer: Answer) -> Score:
    """Score an answer with the dense level's engine.

    Raises:
        EngineError: the engine could not.
    """
    request = GenerationRequest(
        id=f"shadow-{uuid.uuid4().hex[:12]}",
        prompt=answer.prompt + answer.tokens,
        sampling=SamplingParams(max_tokens=1, temperature=0.0, logprobs=1),
        prompt_logprobs=True,
    )
    async with aclosing(engine.generate(request)) as events:  # type: ignore[type-var]
        first = await anext(events)
    scored = (first.prompt_logprobs or ())[len(answer.prompt) :]
    known = [entry for entry in scored if entry.logprob is not None]
    return Score(
        tokens=len(known),
        agreeing=sum(1 for entry in known if entry.top and entry.top[0][0] == entry.token),
        nll_nats=-sum(entry.logprob or 0.0 for entry in known),
    )


class Shadow:
    """Samples answers at `rate` (0..1) and reports their scores.

    Args:
        lease: how to hold a model's dense level.
        on_score: told of every answer scored.
    """

    def __init__(
        self, rate: float, lease: Lease, on_score: Callable[[Answer, Score], None]
    ) -> None:
        self._rate = rate
        self._lease = lease
        self._on_score = on_score
        self._queue: asyncio.Queue[Answer] = asyncio.Queue(_QUEUE)
        self._random = random.Random()  # noqa: S311 - which answers are sampled is no secret

    def offer(self, answer: Answer) -> None:
        """Perhaps take an answer; returns at once."""
        whole = len(answer.prompt) + len(answer.tokens)
        if not answer.tokens or whole >= _MAX_TOKENS or self._queue.full():
            return
        if min(answer.tokens) < 0:  # an upstream that does not tell token ids
            return
        if self._random.random() < self._rate:
            self._queue.put_nowait(answer)

    async def run(self) -> None:
        """Score for ever; an answer that cannot be scored is left out."""
        while True:
            answer = await self._queue.get()
            try:
                async with self._lease(answer.model) as engine:
                    self._on_score(answer, await score(engine, answer))
            except (EngineError, PressgateError, StopAsyncIteration) as error:
                log.info("an answer of %s was not scored: %s", answer.level, error)
