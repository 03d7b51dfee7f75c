"""Moves the sequences of one running answer between levels, when its policy is `adaptive`.

`policy.adapt` says when and where to; here are the looks at the clock and the ladder, the leases of
the levels it goes to (held to the end of the answer, which may go back), and the move itself. What
cannot move (another KV layout, no free place, an engine that cannot) stays where it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Final

from gateway.api.deps import Services
from gateway.api.sse import Choice
from gateway.api.wanted import Wanted
from gateway.engine.base import Engine, GenerationRequest, Movable, TokenEvent
from gateway.errors import PressgateError
from gateway.policy.adapt import EVERY, Going, Outlook
from gateway.policy.decision import Decision
from gateway.policy.house import Wish
from gateway.policy.policy import Policy

log = logging.getLogger(__name__)

Ranges = list[tuple[str, int]]
"""Levels of one sequence in order, each with the index of its first token."""
_ONE_SEQUENCE: Final = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What is being answered, and on whose behalf. `requests` and `choices`: one per sequence."""

    services: Services
    wanted: Wanted
    policy: Policy
    wish: Wish
    decision: Decision
    requests: Sequence[GenerationRequest]
    choices: Sequence[Choice]


@dataclass(slots=True)
class _Course:
    """The way of one sequence. `seen`, `seen_at`: tokens at the last look, and when they came."""

    ranges: Ranges
    seen: int = 0
    seen_at: float = 0.0
    refused: set[str] = field(default_factory=set)  # levels it could not go to

    @property
    def level(self) -> str:
        return self.ranges[-1][0]


class Mover:
    """Follows one answer; `stack` holds the leases of levels it goes to."""

    def __init__(self, answer: Answer, level: str, engine: Engine, stack: AsyncExitStack) -> None:
        """`level`, `engine`: where all its sequences begin."""
        self._answer = answer
        self._stack = stack
        self._engines = {level: engine}
        self._courses = [_Course([(level, 0)]) for _ in answer.requests]

    @property
    def ranges(self) -> list[Ranges]:
        """Where every sequence has been."""
        return [course.ranges for course in self._courses]

    async def after(self, index: int) -> None:
        """Sequence `index` got a token; every now and then, see whether to go elsewhere."""
        course, choice = self._courses[index], self._answer.choices[index]
        tokens, at = choice.tokens, choice.last_at
        if at is None or choice.finish_reason is not None:
            return
        if not course.seen:
            course.seen, course.seen_at = tokens, at
        elif tokens - course.seen >= EVERY:
            pace_ms = 1000.0 * (at - course.seen_at) / (tokens - course.seen)
            course.seen, course.seen_at = tokens, at
            target = self._next(index, pace_ms)
            if target is not None and target not in course.refused:
                await self._move(index, target)

    def _next(self, index: int, pace_ms: float) -> str | None:
        answer, course, choice = self._answer, self._courses[index], self._answer.choices[index]
        services, wanted, case = answer.services, answer.wanted, answer.decision.case
        assert case is not None, "decided just now"
        assert choice.first_at is not None, "looks come after tokens"
        now, since = time.perf_counter(), answer.wish.arrived
        most, done = wanted.sampling.max_tokens, choice.tokens
        expected = services.predictor.lengths.of(answer.policy.name, most).expected
        left = min(most - done, max(EVERY, round(expected) - done))
        going = Going(
            level=course.level,
            context=len(answer.requests[index].prompt) + done,
            done=done,
            left=left,
            first_ms=1000.0 * (choice.first_at - since),
            now_ms=1000.0 * (now - since),
            pace_ms=pace_ms,
            moves=len(course.ranges) - 1,
        )
        snapshot = services.pool.glance(wanted.model)
        predict = services.predictor.under(answer.policy.name, now)
        said = predict(going.context, left, snapshot)
        bearable = services.admission.house(wanted.model).promises.bearable(now)
        outlook = Outlook(case.ask, answer.policy, snapshot, said, bearable.token_ms)
        return outlook.next_level(going)

    async def _move(self, index: int, target: str) -> None:
        answer, course = self._answer, self._courses[index]
        model, origin = answer.wanted.model, course.level
        engine = self._engines[origin]
        there = await self._lease(target)
        boundary = None
        if there is not None and isinstance(engine, Movable):
            boundary = await engine.move(answer.requests[index].id, there)
        if boundary is None:
            course.refused.add(target)
            return
        course.ranges.append((target, boundary))
        answer.services.admission.shift(answer.wish, origin, target, _ONE_SEQUENCE)
        answer.services.metrics.moved(model, origin, target)
        log.debug("%s: from %s to %s after %d tokens", model, origin, target, boundary)

    async def _lease(self, level: str) -> Engine | None:
        """The engine of a level that is ready; None when it no longer is."""
        if level not in self._engines:
            answer = self._answer
            lease = answer.services.pool.lease(answer.wanted.model, level, wait_s=0.0)
            try:
                self._engines[level] = await self._stack.enter_async_context(lease)
            except PressgateError as error:
                log.debug("not moved: %s", error.message)
                return None
        return self._engines[level]


async def adapting(
    events: AsyncGenerator[tuple[int, TokenEvent]], mover: Mover
) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """`events` as they come; between two of them, sequences may move. Closing closes them."""
    async with aclosing(events):
        async for index, event in events:
            yield index, event
            await mover.after(index)
