"""One run: a fresh server, one window of the trace, everything judged. And the levels before that.

Every run starts from its own copy (hard links) of a cache in which the study's levels are built, so
that what one run builds or learns is not there for the next.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import httpx
import numpy as np
import yaml

from loadtest.client import Client, Target, calibrate
from loadtest.mix import Lengths
from loadtest.peers.child import EngineError
from loadtest.peers.servers import Server, Spec, settle
from loadtest.runner import Bounds, Run, run_open
from loadtest.sla.judge import Judged, judge, summarize
from loadtest.sla.study import Study
from loadtest.sla.systems import Cards, System, systems
from loadtest.workloads import Arrival, DefaultLengths, Planned, TextPrompts, TraceScale, plan

_POLL_SECONDS: Final = 0.5
_BODY: Final = {"temperature": 0.0, "ignore_eos": True}  # answers as long as the trace's


@dataclass(frozen=True, slots=True)
class Scene:
    """What all runs share: the study, rows of the trace(s), the folder with the built cache."""

    study: Study
    trace: Sequence[Arrival]  # in order of time, as recorded
    cache: Path


def prepare(study: Study, cache: Path) -> None:
    """Build what the study begins with, into `cache`; quick when it is there already.

    Raises:
        EngineError: the server did not start, or a level cannot be built.
    """
    system = next(one for one in systems(study) if one.kind == "pressgate")
    with _serving(system, cache) as server:
        for level in system.loaded:
            _build(server, level)
        settle(server, system.loaded, study.model)


def _build(server: Server, level: str) -> None:
    """Build a level that is not there yet, however long it takes.

    Raises:
        EngineError: it cannot be built.
    """
    answer = httpx.post(f"{server.url}/v1/levels/{quote(level, safe='')}:build", timeout=60)
    if answer.status_code == httpx.codes.CONFLICT:
        return
    job = answer.json()
    while job.get("state") in ("queued", "running"):
        time.sleep(_POLL_SECONDS)
        job = httpx.get(f"{server.url}/v1/jobs/{job['id']}", timeout=60).json()
    if job.get("state") != "done":
        raise EngineError(f"{server.name}: {level}: {job.get('error')}")


def window(scene: Scene, seed: int, prompts: TextPrompts) -> list[Planned]:
    """The requests of one seed: a window of the trace that begins at a random row, at the study's
    mean rate, with classes and prompts drawn; the same for every system."""
    traffic, rng = scene.study.traffic, np.random.default_rng([seed, 7])
    count = round(traffic.rate * traffic.seconds)
    first = int(rng.integers(max(1, len(scene.trace) - count)))
    rows = scene.trace[first : first + count]
    start, last = rows[0].at or 0.0, rows[-1].at or 0.0
    speed = max(1e-9, last - start) / traffic.seconds
    scale = TraceScale(speed, traffic.length, traffic.max_prompt, traffic.max_output)
    arrivals = [_scaled(row, start, scale) for row in rows]
    lengths = DefaultLengths(Lengths(low=1, high=1), Lengths(low=1, high=1))
    return plan(arrivals, scene.study.mix, prompts, lengths, rng)


def _scaled(row: Arrival, start: float, scale: TraceScale) -> Arrival:
    return Arrival(
        at=((row.at or 0.0) - start) / scale.time,
        prompt_tokens=min(max(1, round((row.prompt_tokens or 1) * scale.length)), scale.max_prompt),
        max_tokens=min(max(2, round((row.max_tokens or 1) * scale.length)), scale.max_output),
    )


def run_once(scene: Scene, system: System, seed: int) -> dict[str, Any]:
    """One system on one window: what it was worth.

    Raises:
        EngineError: the server did not start or cannot load a level.
    """
    study = scene.study
    with tempfile.TemporaryDirectory(dir=scene.cache.parent) as folder:
        cache = Path(folder) / "cache"
        shutil.copytree(scene.cache, cache, copy_function=os.link)
        with _serving(system, cache) as server:
            settle(server, system.loaded, study.model)
            _only(server, system, study.model)
            run, peak = asyncio.run(_drive(server, scene, system, seed))
            cards = _cards(server)
    judged = _judged(study, run, cards)
    return {"system": system.name, "kind": system.kind, "seed": seed} | summarize(
        study, judged, peak
    )


def _judged(study: Study, run: Run, cards: Cards) -> list[Judged]:
    return [
        judge(outcome, study.caller(outcome.planned.traffic.name).promise, cards)
        for outcome in run.outcomes
        if (outcome.planned.at or 0.0) >= study.traffic.warm_seconds
    ]


async def _drive(server: Server, scene: Scene, system: System, seed: int) -> tuple[Run, float]:
    """(the run, the most bytes of weights and KV the server held meanwhile)."""
    traffic, cards = scene.study.traffic, _cards(server)
    target = replace(server.target, body=_BODY, model=scene.study.model, keep_alive=True)
    async with Client(target) as client:
        prompts = await _prompts(client, target)
        planned = [system.address(one, cards) for one in window(scene, seed, prompts)]
        watch = asyncio.create_task(_peak(server.url))
        bounds = Bounds(traffic.seconds + 1.0, traffic.drain_seconds)
        run = await run_open(client, planned, bounds, lambda _: None)
        watch.cancel()
        return run, await watch


async def _prompts(client: Client, target: Target) -> TextPrompts:
    """Words, with the server's own count of tokens."""
    rng = np.random.default_rng(1)
    source = TextPrompts.from_words(rng)
    probes = (source.prompt(60, rng), source.prompt(300, rng))
    return source.scaled(*await calibrate(client, target, probes))


async def _peak(url: str) -> float:
    most = 0.0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        try:
            while True:
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(url + "/v1/memory") as response:
                        most = max(most, float((await response.json())["used_bytes"]))
                await asyncio.sleep(_POLL_SECONDS)
        except asyncio.CancelledError:
            return most


def _only(server: Server, system: System, model: str) -> None:
    """Unload what the system does not serve (a server loads its dense level at start)."""
    for row in httpx.get(server.url + "/v1/levels", timeout=60).json()["data"]:
        if row["state"] == "ready" and row["level"] not in system.loaded:
            httpx.post(f"{server.url}/v1/levels/{quote(row['level'], safe='')}:evict", timeout=60)


def _cards(server: Server) -> dict[str, Mapping[str, Any]]:
    rows = httpx.get(server.url + "/v1/levels", timeout=60).json()["data"]
    return {row["level"]: row for row in rows}


@contextmanager
def _serving(system: System, cache: Path) -> Iterator[Server]:
    """A server of the system on a free port.

    Raises:
        EngineError: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pressgate.yaml"
        file.write_text(yaml.safe_dump({**system.settings, "cache": {"dir": str(cache)}}))
        command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(file)]
        model = str(system.settings["models"][0]["id"])
        command += ["--port", "{port}"]
        spec = Spec(system.name, command, "/readyz", model, system.name, _BODY, {})
        server = Server(spec)
        try:
            yield server
        finally:
            server.close()


__all__ = ["EngineError", "Scene", "prepare", "run_once", "window"]
