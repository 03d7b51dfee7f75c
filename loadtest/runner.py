"""The runner: plays a plan against a server, open loop or closed loop, and always comes to an end.

Open loop: every request leaves at its moment, whatever the server does. Closed loop: N users.
Bounds: `Bounds.duration` stops the sending, `Bounds.drain` seconds later what is still running is
cut off (and counted as timed out), `Bounds.in_flight` is a ceiling on requests under way; what
would go above it is not sent and counted as an error, because a client that waits would hide the
queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.client import Client, Outcome
from loadtest.workloads import Planned

Progress = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long and how wide a run may be (seconds, requests)."""

    duration: float = 60.0
    drain: float = 60.0
    in_flight: int = 1024


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run saw, by plan order. `elapsed` (s) goes from the start to the last answer;
    `started_at` is Unix time."""

    outcomes: tuple[Outcome, ...]
    elapsed: float
    started_at: float


async def run_open(
    client: Client, plan: Sequence[Planned], bounds: Bounds, progress: Progress
) -> Run:
    """Send each request at its own moment (`Planned.at`)."""
    clock, start = time.time(), time.perf_counter()
    end = start + bounds.duration + bounds.drain
    outcomes: list[Outcome] = []
    under_way: set[int] = set()

    async def one(planned: Planned, intended: float) -> None:
        outcome = await client.send(planned, intended, end)
        under_way.discard(planned.index)
        outcomes.append(outcome)
        progress(outcome)

    async with asyncio.TaskGroup() as tasks:
        for planned in plan:
            assert planned.at is not None, "an open-loop plan has a moment for every request"
            if planned.at >= bounds.duration:
                break
            intended = start + planned.at
            await asyncio.sleep(intended - time.perf_counter())
            if len(under_way) >= bounds.in_flight:
                outcomes.append(_not_sent(planned, intended))
                progress(outcomes[-1])
                continue
            under_way.add(planned.index)
            tasks.create_task(one(planned, intended))
    return _close(outcomes, start, clock)


async def run_closed(
    client: Client, plan: Sequence[Planned], users: int, bounds: Bounds, progress: Progress
) -> Run:
    """`users` callers, each sending its next request when the last one ended."""
    clock, start = time.time(), time.perf_counter()
    end = start + bounds.duration + bounds.drain
    outcomes: list[Outcome] = []
    queue = iter(plan)

    async def user() -> None:
        for planned in queue:
            if time.perf_counter() >= start + bounds.duration:
                return
            outcome = await client.send(planned, end=end)
            outcomes.append(outcome)
            progress(outcome)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(users, bounds.in_flight)):
            tasks.create_task(user())
    return _close(outcomes, start, clock)


def _close(outcomes: list[Outcome], start: float, clock: float) -> Run:
    ordered = tuple(sorted(outcomes, key=lambda outcome: outcome.planned.index))
    elapsed = max((outcome.finished for outcome in ordered), default=start) - start
    return Run(outcomes=ordered, elapsed=elapsed, started_at=clock)


def _not_sent(planned: Planned, intended: float) -> Outcome:
    now = time.perf_counter()
    error = "not sent: --max-in-flight requests were under way"
    return Outcome(planned, intended=intended, sent=now, finished=now, error=error)
