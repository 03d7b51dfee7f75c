"""The `stall` command: does a build on the fly disturb the streams that run meanwhile?

Some callers stream without a pause; after a quiet window a build is started through
`POST /v1/levels/{name}:build`; every gap between two chunks is filed under *before* or *during* (it
overlaps the build). The level's artifact is deleted before each run, so that every run really
builds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import aiohttp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadtest import options as opt
from loadtest.client import Client, Outcome
from loadtest.machine import provenance
from loadtest.mix import Goals, single_class
from loadtest.workloads import Planned, TextPrompts

POLL_SECONDS = 0.2
ENDED = ("done", "failed", "cancelled")


class BuildProblem(Exception):
    """The server would not build, or the build did not end well."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: `streams` callers, `before` seconds of quiet, at most `limit` seconds of
    build."""

    level: str
    model: str
    streams: int
    max_tokens: int
    before: float
    limit: float
    runs: int


def command(
    *,
    level: Annotated[str, typer.Option(help="Level to build; deleted before each run.")],
    url: opt.Url = "http://127.0.0.1:8000",
    model: opt.ModelName = "docs-17m",
    pinned: Annotated[str, typer.Option(help="Level that streams; - for the gateway's.")] = "bf16",
    streams: Annotated[int, typer.Option(min=1, max=256)] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, max=4096)] = 256,
    before: Annotated[float, typer.Option(min=1.0, max=600.0, help="Quiet seconds first.")] = 10.0,
    limit: Annotated[float, typer.Option(min=1.0, max=7200, help="Longest build, s.")] = 600.0,
    runs: Annotated[int, typer.Option(min=1, max=50)] = 3,
    api_key_env: opt.ApiKeyEnv = "PRESSGATE_API_KEY",
    allow_remote: opt.AllowRemote = False,
    json_out: opt.JsonOut = None,
) -> None:
    """Measure the time between tokens before and during a build (needs a Pressgate server)."""
    opt.check_writable(json_out, "--json")
    target = opt.make_target(
        opt.check_url(url, allow_remote),
        model if pinned == "-" else f"{model}@{pinned}",
        api_key_env=api_key_env,
        body='{"temperature": 0, "ignore_eos": true}',
        timeout=3600.0,
    )
    plan = Plan(level, model, streams, max_tokens, before, limit, runs)
    started = time.time()
    try:
        results = asyncio.run(_measure(Client(target), plan))
    except (BuildProblem, aiohttp.ClientError, TimeoutError, OSError) as error:
        Console(stderr=True).print(f"error: {error or type(error).__name__}", markup=False)
        raise typer.Exit(1) from None
    _deliver(provenance(started) | summarize(results), json_out)


async def _measure(client: Client, plan: Plan) -> list[dict[str, Any]]:
    async with client:
        return [await _one_run(client, plan, seed) for seed in range(plan.runs)]


async def _one_run(client: Client, plan: Plan, seed: int) -> dict[str, Any]:
    await _evict(client, plan)
    stop = asyncio.Event()
    prompts = TextPrompts.from_words(np.random.default_rng(seed))
    streams = [
        _stream(client, plan, prompts, [seed, caller], stop) for caller in range(plan.streams)
    ]
    collected, window = await asyncio.gather(
        asyncio.gather(*streams), _timed_build(client, plan, stop)
    )
    outcomes = [outcome for stream in collected for outcome in stream]
    failed = next((outcome for outcome in outcomes if outcome.status != "ok"), None)
    if failed is not None:
        raise BuildProblem(f"a stream failed: {failed.status}: {failed.error}")
    if isinstance(window, BuildProblem):
        raise window
    begin, end, build_seconds = window
    return compare(outcomes, begin, end) | {"build_seconds": build_seconds}


async def _timed_build(
    client: Client, plan: Plan, stop: asyncio.Event
) -> tuple[float, float, float] | BuildProblem:
    """Wait out the quiet window, build, stop the streams. Returns begin and end on the run's clock
    and the server's build seconds; a problem is returned, so that the streams end first."""
    try:
        await asyncio.sleep(plan.before)
        begin = time.perf_counter()
        build_seconds = await _build(client, plan)
        return begin, time.perf_counter(), build_seconds
    except BuildProblem as problem:
        return problem
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return BuildProblem(f"the server went away: {error or type(error).__name__}")
    finally:
        stop.set()


async def _stream(
    client: Client, plan: Plan, prompts: TextPrompts, seed: Sequence[int], stop: asyncio.Event
) -> list[Outcome]:
    """One caller: stream after stream until told to stop; the first, cold one is left out."""
    rng = np.random.default_rng(seed)
    traffic = single_class(Goals()).classes[0]
    outcomes: list[Outcome] = []
    while not stop.is_set():
        prompt = prompts.prompt(32, rng)
        planned = Planned(len(outcomes), None, traffic, prompt, 32, plan.max_tokens)
        outcomes.append(await client.send(planned))
        if outcomes[-1].status != "ok":
            break
    return outcomes[1:] if len(outcomes) > 1 else outcomes


async def _evict(client: Client, plan: Plan) -> None:
    status, answer = await client.call("POST", _path(plan, "evict") + "&delete=true")
    if status >= 400:
        raise BuildProblem(f"evicting {plan.level} was answered with {status}: {answer}")


async def _build(client: Client, plan: Plan) -> float:
    """Start the build and wait for its end. Returns the seconds the server says it took."""
    status, answer = await client.call("POST", _path(plan, "build"))
    if status >= 400 or not isinstance(answer, dict) or "id" not in answer:
        raise BuildProblem(f"building {plan.level} was answered with {status}: {answer}")
    deadline = time.perf_counter() + plan.limit
    while time.perf_counter() < deadline:
        status, job = await client.call("GET", f"/v1/jobs/{quote(answer['id'], safe='')}")
        if status != 200:
            raise BuildProblem(f"the job was answered with {status}: {job}")
        if job["state"] == "done":
            return float(job["build_seconds"])
        if job["state"] in ENDED:
            raise BuildProblem(f"the build ended as {job['state']}: {job.get('error')}")
        await asyncio.sleep(POLL_SECONDS)
    raise BuildProblem(f"the build did not end within {plan.limit:g} s")


def _path(plan: Plan, verb: str) -> str:
    return f"/v1/levels/{quote(plan.level, safe='')}:{verb}?model={quote(plan.model, safe='')}"


def compare(outcomes: Sequence[Outcome], begin: float, end: float) -> dict[str, Any]:
    """File every gap between chunks under before or during the build [begin, end] (run's clock).

    Returns p50 and p99 in ms of both sides, how many gaps each has, and the ratios during / before;
    a side without gaps makes its numbers None.
    """
    starts = np.concatenate([o.token_times[:-1] for o in outcomes] or [[]])
    stops = np.concatenate([o.token_times[1:] for o in outcomes] or [[]])
    before, during = stops <= begin, (stops > begin) & (starts < end)
    result: dict[str, Any] = {}
    for name, which in (("before", before), ("during", during)):
        gaps = 1000 * (stops - starts)[which]
        result[name] = {
            "gaps": int(which.sum()),
            **{f"p{p}_ms": float(np.percentile(gaps, p)) if gaps.size else None for p in (50, 99)},
        }
    for p in ("p50", "p99"):
        quiet, busy = result["before"][f"{p}_ms"], result["during"][f"{p}_ms"]
        result[f"{p}_ratio"] = busy / quiet if quiet and busy else None
    return result


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every run and the median ratios."""
    medians = {}
    for name in ("p50_ratio", "p99_ratio", "build_seconds"):
        values = [run[name] for run in runs if run[name] is not None]
        medians[name] = float(np.median(values)) if values else None
    return {"runs": list(runs), "median": medians}


def _deliver(report: dict[str, Any], json_out: Path | None) -> None:
    columns = ("run", "build s", "p50 before", "during", "ratio", "p99 before", "during", "ratio")
    table = Table(*columns, title="Time between tokens, ms")
    for number, run in enumerate(report["runs"], start=1):
        cells = [run["build_seconds"]]
        for p in ("p50", "p99"):
            cells += [run["before"][f"{p}_ms"], run["during"][f"{p}_ms"], run[f"{p}_ratio"]]
        table.add_row(str(number), *("–" if cell is None else f"{cell:.2f}" for cell in cells))
    medians = report["median"]
    table.add_row(
        "median",
        *(
            "" if x is None else f"{x:.2f}"
            for x in (
                medians["build_seconds"],
                None,
                None,
                medians["p50_ratio"],
                None,
                None,
                medians["p99_ratio"],
            )
        ),
    )
    opt.deliver_json(report, json_out).print(table)
