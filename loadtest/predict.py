"""The `predict` command: are a gateway's predictions true, and are its upper quantiles kept?

One open-loop run in phases: a steady Poisson mix over some levels (its beginning to learn from), a
burst of a multiple of that rate, and the time after it. Every answer says what had been predicted
for it and what was measured; errors and kept bounds are reported per phase and per level. Only
HTTP; works with any Pressgate server, or starts one here.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import httpx
import numpy as np
import typer
import yaml
from rich.console import Console

from loadtest import options as opt
from loadtest.client import Client, Target, calibrate
from loadtest.machine import provenance
from loadtest.mix import BadInput, Goals, Mix, TrafficClass
from loadtest.peers.child import EngineError
from loadtest.peers.servers import Server, Spec, settle
from loadtest.predict_report import PHASES, Answer, answers, show, summarize
from loadtest.runner import Bounds, run_open
from loadtest.workloads import Arrival, DefaultLengths, TextPrompts, plan, poisson

_DRAIN = 60.0
_KV_FRACTION = 0.05  # of the server started: so little that these prompts use all of it once
_KV_PROMPTS, _KV_WORDS = 30, 600
_Seconds = Annotated[float, typer.Option(min=0.0, max=3600.0, callback=opt.finite)]


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: `rate` requests per second, `burst` times as many in the burst; `seconds`: how
    long each of `PHASES` lasts."""

    rate: float
    burst: float
    seconds: tuple[float, ...]
    lengths: DefaultLengths
    seed: int


def command(
    *,
    url: Annotated[
        str | None, typer.Option(help="A running server, without /v1; none: one is started here.")
    ] = None,
    model: opt.ModelName = "docs-17m",
    levels: Annotated[str, typer.Option(help="Comma-separated.")] = "bf16,int8,int4-rtn-g64",
    rate: Annotated[float, typer.Option(min=0.01, max=1e4, callback=opt.finite)] = 6.0,
    burst: Annotated[float, typer.Option(min=1.0, max=100.0, help="Times the rate.")] = 4.0,
    warm_seconds: _Seconds = 15.0,
    steady_seconds: _Seconds = 20.0,
    burst_seconds: _Seconds = 8.0,
    after_seconds: _Seconds = 10.0,
    prompt_tokens: Annotated[str, typer.Option(help="N or LOW:HIGH")] = "32:256",
    max_tokens: Annotated[str, typer.Option(help="N or LOW:HIGH")] = "32:96",
    threads: Annotated[int, typer.Option(min=1, max=256, help="Of the server started.")] = 2,
    speculate: Annotated[str, typer.Option(help="`engine.speculate` of the server.")] = "auto",
    body: opt.Body = '{"ignore_eos": true}',
    seed: opt.Seed = 0,
    timeout: opt.Timeout = 120.0,
    api_key_env: opt.ApiKeyEnv = "PRESSGATE_API_KEY",
    allow_remote: opt.AllowRemote = False,
    json_out: opt.JsonOut = None,
) -> None:
    """Compare what the gateway predicts with what it measures, steady and through a burst."""
    opt.check_writable(json_out, "--json")
    names = [name for name in levels.split(",") if name]
    if not names:
        raise BadInput("--levels: name at least one level")
    lengths = DefaultLengths(
        prompt=opt.parse_lengths(prompt_tokens, "--prompt-tokens"),
        output=opt.parse_lengths(max_tokens, "--max-tokens"),
    )
    seconds = (warm_seconds, steady_seconds, burst_seconds, after_seconds)
    load = Load(rate, burst, seconds, lengths, seed)
    started = time.time()
    try:
        if url is not None:
            place: AbstractContextManager[str] = nullcontext(opt.check_url(url, allow_remote))
        else:
            place = _server(names, model, threads, speculate)
        with place as address:
            target = opt.make_target(
                address, model, api_key_env=api_key_env, body=body, timeout=timeout
            )
            found = asyncio.run(_measure(target, names, load))
    except (EngineError, aiohttp.ClientError, httpx.HTTPError, TimeoutError, OSError) as error:
        _fail(str(error) or type(error).__name__)
    if not found:
        _fail("no answer carried predicted and measured times: is this a Pressgate server?")
    report = provenance(started) | {
        "levels": names,
        "rate": rate,
        "burst": burst,
        "seconds": dict(zip(PHASES, seconds, strict=True)),
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "seed": seed,
        **summarize(found),
    }
    show(report, opt.deliver_json(report, json_out))


def arrivals(load: Load) -> tuple[list[Arrival], list[float]]:
    """(when requests leave, when each phase ends), seconds from the start."""
    rng = np.random.default_rng([load.seed, 2])
    found: list[Arrival] = []
    ends: list[float] = []
    begin = 0.0
    for phase, seconds in zip(PHASES, load.seconds, strict=True):
        rate = load.rate * (load.burst if phase == "burst" else 1.0)
        most = int(10 * rate * seconds) + 10
        for arrival in poisson(rate, seconds, most, rng):
            assert arrival.at is not None, "open loop"
            found.append(Arrival(at=begin + arrival.at))
        begin += seconds
        ends.append(begin)
    return found, ends


async def _measure(target: Target, levels: Sequence[str], load: Load) -> list[Answer]:
    rng = np.random.default_rng([load.seed, 1])
    mix = Mix(
        classes=tuple(
            TrafficClass(name=f"level{index}", model=f"{target.model}@{level}", goals=Goals())
            for index, level in enumerate(levels)
        )
    )
    source = TextPrompts.from_words(rng)
    probes = (source.prompt(60, rng), source.prompt(300, rng))
    moments, ends = arrivals(load)
    async with Client(target) as client:
        try:
            source = source.scaled(*await calibrate(client, target, probes))
        except LookupError as error:
            raise EngineError(str(error)) from None
        planned = plan(moments, mix, source, load.lengths, rng)
        bounds = Bounds(ends[-1] + 1.0, _DRAIN)
        run = await run_open(client, planned, bounds, lambda _outcome: None)
    return answers(run.outcomes, ends)


@contextmanager
def _server(levels: Sequence[str], model: str, threads: int, speculate: str) -> Iterator[str]:
    """The address of a new server, its levels built and loaded and its KV pool used once."""
    with tempfile.TemporaryDirectory(prefix="pressgate-predict-") as folder:
        server = Server(_spec(folder, levels, model, threads, speculate))
        try:
            settle(server, levels, model)
            _use_kv(server, f"{model}@{levels[0]}")
            yield server.url
        finally:
            server.close()


def _use_kv(server: Server, model: str) -> None:
    """Write to every page of the KV pool: the first use of each is not what a server that has run
    for a while meets, and costs some answers 20 ms."""
    rng = np.random.default_rng(0)
    for _ in range(_KV_PROMPTS):
        prompt = " ".join(rng.choice(("the", "of", "and", "in", "is", "for"), _KV_WORDS))
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=_DRAIN)
        if answer.status_code != httpx.codes.OK:
            raise EngineError(f"{server.name}: {answer.text[:300]}")


def _spec(folder: str, levels: Sequence[str], model: str, threads: int, speculate: str) -> Spec:
    """A server of the bundled model that promises 95 of 100."""
    settings: dict[str, Any] = {
        "models": [{"id": model, "path": "builtin"}],
        "levels": [level for level in levels if level != "bf16"],
        "threads": threads,
        "engine": {"speculate": speculate, "kv_fraction": _KV_FRACTION},
        "policies": [{"name": "default", "confidence": 0.95}],
        "log_level": "warning",
    }
    file = Path(folder) / "pressgate.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(file)]
    command += ["--port", "{port}"]
    environment = {"OMP_NUM_THREADS": str(threads)}
    return Spec("pressgate", command, "/readyz", model, "", {}, environment)


def _fail(text: str) -> None:
    Console(stderr=True).print(f"error: {text}", markup=False)
    raise typer.Exit(1)
