"""Live quality: what is sampled, what is scored, and that nothing of it can hurt a request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.engine.base import Engine, EngineFailed
from gateway.engine.fake import FakeEngine, FakeSpeed
from gateway.quality.shadow import Answer, Score, Shadow, score

ANSWER = Answer("m", "int8", (1, 2, 3), (4, 5, 6, 7))


async def test_every_answered_token_is_scored_and_no_prompt_token() -> None:
    """The stand-in gives each token logprob -0.1 and ranks it first."""
    found = await score(FakeEngine(FakeSpeed(tpot_ms=0)), ANSWER)
    assert found.tokens == found.agreeing == len(ANSWER.tokens)
    assert math.isclose(found.nll_nats, 0.1 * len(ANSWER.tokens))


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 5)])
async def test_the_rate_says_how_many_are_taken(rate: float, expected: int) -> None:
    scored: list[Score] = []
    shadow = Shadow(rate, _lease, lambda _answer, found: scored.append(found))
    for _ in range(5):
        shadow.offer(ANSWER)
    await _run(shadow)
    assert len(scored) == expected


async def test_what_does_not_fit_the_queue_is_dropped() -> None:
    scored: list[Score] = []
    shadow = Shadow(1.0, _lease, lambda _answer, found: scored.append(found))
    for _ in range(100):
        shadow.offer(ANSWER)
    await _run(shadow)
    assert len(scored) == 16


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer("m", "int8", (1,), ()), id="nothing generated"),
        pytest.param(Answer("m", "up", (1,), (2, -1)), id="an upstream without token ids"),
        pytest.param(Answer("m", "int8", (1,) * 1024, (2,)), id="too long"),
    ],
)
async def test_answers_that_cannot_be_scored_are_left_out(answer: Answer) -> None:
    scored: list[Score] = []
    shadow = Shadow(1.0, _lease, lambda _answer, found: scored.append(found))
    shadow.offer(answer)
    await _run(shadow)
    assert not scored


async def test_a_failing_engine_costs_one_sample_only() -> None:
    calls = iter([True, False])

    @asynccontextmanager
    async def sometimes(_model: str) -> AsyncIterator[Engine]:
        if next(calls):
            raise EngineFailed("gone")
        yield FakeEngine(FakeSpeed(tpot_ms=0))

    scored: list[Score] = []
    shadow = Shadow(1.0, sometimes, lambda _answer, found: scored.append(found))
    shadow.offer(ANSWER)
    shadow.offer(ANSWER)
    await _run(shadow)
    assert len(scored) == 1


@asynccontextmanager
async def _lease(_model: str) -> AsyncIterator[Engine]:
    yield FakeEngine(FakeSpeed(tpot_ms=0))


async def _run(shadow: Shadow) -> None:
    """Let it work off its queue."""
    task = asyncio.create_task(shadow.run())
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
