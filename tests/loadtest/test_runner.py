from __future__ import annotations

import numpy as np

from loadtest.client import Client, Outcome, Target
from loadtest.mix import Goals, single_class
from loadtest.report import summarize
from loadtest.runner import Bounds, Run, run_closed, run_open
from loadtest.workloads import Planned
from tests.loadtest.standin import Behaviour, StandIn, serve

TRAFFIC = single_class(Goals()).classes[0]


def at(*moments: float | None, max_tokens: int = 3) -> list[Planned]:
    return [Planned(i, m, TRAFFIC, "hi", 1, max_tokens) for i, m in enumerate(moments)]


async def play_open(server: StandIn, plan: list[Planned], bounds: Bounds) -> Run:
    async with Client(Target(server.url, "m")) as client:
        return await run_open(client, plan, bounds, lambda _: None)


async def test_open_loop_sends_on_time_whatever_the_server_does() -> None:
    moments = [0.1 * i for i in range(10)]
    with serve(Behaviour(ttft=2.0)) as server:  # nothing ends before the last is sent
        run = await play_open(server, at(*moments), Bounds(duration=10, drain=10))
    assert server.most_active == 10
    lag = [outcome.sent - outcome.intended for outcome in run.outcomes]
    assert all(0 <= late < 0.25 for late in lag)
    intended = np.array([outcome.intended for outcome in run.outcomes])
    assert np.allclose(intended - intended[0], moments)


async def test_a_queue_in_the_server_shows_in_the_time_to_first_token() -> None:
    # One request takes 0.2 s and five arrive at once: they wait 0, 0.2, … 0.8 s.
    with serve(Behaviour(ttft=0.2, one_at_a_time=True)) as server:
        run = await play_open(server, at(0, 0, 0, 0, 0), Bounds(duration=10, drain=10))
    waits = sorted(outcome.ttft or 0 for outcome in run.outcomes)
    for place, wait in enumerate(waits, start=1):
        assert 0.2 * place <= wait < 0.2 * place + 0.3


async def test_closed_loop_never_has_more_than_its_users() -> None:
    seen: list[Outcome] = []
    with serve(Behaviour(ttft=0.05)) as server:
        async with Client(Target(server.url, "m")) as client:
            run = await run_closed(client, at(*[None] * 20), 4, Bounds(), seen.append)
    assert server.most_active == 4
    assert [outcome.planned.index for outcome in run.outcomes] == list(range(20))
    assert len(seen) == 20


async def test_the_duration_ends_a_closed_run() -> None:
    with serve(Behaviour(ttft=0.1)) as server:
        async with Client(Target(server.url, "m")) as client:
            plan, bounds = at(*[None] * 1000), Bounds(duration=0.5, drain=5)
            run = await run_closed(client, plan, 2, bounds, lambda _: None)
    assert 0 < len(run.outcomes) < 30
    assert all(outcome.status == "ok" for outcome in run.outcomes)


async def test_a_server_that_hangs_cannot_hold_a_run() -> None:
    with serve(Behaviour(hang_after=1)) as server:
        run = await play_open(server, at(0, 0.1, 99.0), Bounds(duration=0.5, drain=0.5))
        async with Client(Target(server.url, "m")) as client:
            plan, bounds = at(None, None), Bounds(duration=0.5, drain=0.5)
            closed = await run_closed(client, plan, 2, bounds, lambda _: None)
    assert [outcome.status for outcome in run.outcomes] == ["timeout"] * 2
    assert [outcome.status for outcome in closed.outcomes] == ["timeout"] * 2
    assert run.elapsed < 5


async def test_what_could_not_be_sent_is_counted_not_hidden() -> None:
    with serve(Behaviour(ttft=1.0)) as server:
        bounds = Bounds(duration=10, drain=10, in_flight=2)
        run = await play_open(server, at(0, 0.05, 0.1, 0.15), bounds)
    statuses = [outcome.status for outcome in run.outcomes]
    assert statuses == ["ok", "ok", "error", "error"]
    assert summarize(run)["total"]["attainment"] == 0.5
    assert len(server.bodies) == 2
