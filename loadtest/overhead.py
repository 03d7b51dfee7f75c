"""The `overhead` command: what a gateway adds to the server behind it.

Either against a baseline (the same requests straight to the server behind, in alternating rounds so
that a drifting machine touches both), or against an engine of known speed (`pressgate serve` with a
fake model): then what is above the nominal times is the gateway's own. A gateway that tells in its
metrics how long its decisions took is asked for that too.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import numpy as np
import typer
from rich.table import Table

from loadtest import options as opt
from loadtest.client import Client, Outcome, Target
from loadtest.machine import provenance
from loadtest.mix import BadInput, Goals, Lengths, single_class
from loadtest.report import spread
from loadtest.runner import Bounds, run_closed, run_open
from loadtest.workloads import DefaultLengths, TextPrompts, closed, constant, plan

ROUNDS = 2
_BUCKET: Final = re.compile(r'pressgate_decision_seconds_bucket\{.*le="([^"]+)".*\} (\S+)')
_Nominal = Annotated[float | None, typer.Option(min=0.0, help="Known time of the fake engine.")]


def command(
    *,
    url: opt.Url = "http://127.0.0.1:8000",
    model: opt.ModelName = "fake",
    baseline_url: Annotated[str | None, typer.Option(help="The server behind.")] = None,
    nominal_ttft_ms: _Nominal = None,
    nominal_tpot_ms: _Nominal = None,
    users: Annotated[int, typer.Option(min=1, max=1000, help="Closed loop.")] = 16,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-3, max=1e5, callback=opt.finite, help="Open loop: requests per second."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=100_000)] = 400,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 32,
    seed: opt.Seed = 0,
    timeout: opt.Timeout = 60.0,
    api_key_env: opt.ApiKeyEnv = "PRESSGATE_API_KEY",
    allow_remote: opt.AllowRemote = False,
    json_out: opt.JsonOut = None,
) -> None:
    """Measure what a gateway adds in time to first token, per token and end to end."""
    opt.check_writable(json_out, "--json")
    nominal = (nominal_ttft_ms, nominal_tpot_ms)
    if (baseline_url is None) == (None in nominal):
        raise BadInput(
            "give --baseline-url, or both --nominal-ttft-ms and --nominal-tpot-ms (and not both)"
        )
    urls = {"gateway": opt.check_url(url, allow_remote)}
    if baseline_url is not None:
        urls["baseline"] = opt.check_url(baseline_url, allow_remote, "--baseline-url")
    targets = {
        name: opt.make_target(
            address, model, api_key_env=api_key_env, body='{"temperature": 0}', timeout=timeout
        )
        for name, address in urls.items()
    }
    started = time.time()
    load = _Load(users, rate, requests, max_tokens, seed)
    outcomes, decisions = asyncio.run(_measure(targets, load))
    report = provenance(started) | {"users": users, "rate": rate, "requests": requests}
    report |= summarize(outcomes, nominal_ttft_ms, nominal_tpot_ms, max_tokens)
    report["decision_us"] = decisions
    _deliver(report, json_out)


@dataclass(frozen=True, slots=True)
class _Load:
    """`requests` of `max_tokens`, at a steady `rate` per second or else by so many `users`."""

    users: int
    rate: float | None
    requests: int
    max_tokens: int
    seed: int


async def _measure(
    targets: dict[str, Target], load: _Load
) -> tuple[dict[str, list[Outcome]], dict[str, float] | None]:
    """(outcomes by side, the gateway's decision times)."""
    collected: dict[str, list[Outcome]] = {name: [] for name in targets}
    lengths = DefaultLengths(
        prompt=Lengths(low=32, high=32), output=Lengths(low=load.max_tokens, high=load.max_tokens)
    )
    before = await decision_buckets(targets["gateway"].url)
    count = max(1, load.requests // ROUNDS)
    for part in range(ROUNDS):
        for name, target in targets.items():
            rng = np.random.default_rng([load.seed, part])
            arrivals = closed(count) if load.rate is None else constant(load.rate, 3600, count)
            mix = single_class(Goals())
            planned = plan(arrivals, mix, TextPrompts.from_words(rng), lengths, rng)
            bounds = Bounds(3600, 60)
            async with Client(target) as client:
                if load.rate is None:
                    run = await run_closed(client, planned, load.users, bounds, lambda _: None)
                else:
                    run = await run_open(client, planned, bounds, lambda _: None)
            collected[name] += run.outcomes
    return collected, decision_times(before, await decision_buckets(targets["gateway"].url))


async def decision_buckets(url: str) -> dict[float, float]:
    """Decisions so far by their time, cumulative by upper bound (s), from a gateway's metrics;
    empty when it tells none."""
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url + "/metrics") as response,
        ):
            text = await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
        return {}
    found: dict[float, float] = {}
    for line in text.splitlines():
        if (match := _BUCKET.match(line)) is not None:
            bound = float(match[1].replace("+Inf", "inf"))
            found[bound] = found.get(bound, 0.0) + float(match[2])
    return found


def decision_times(
    before: Mapping[float, float], after: Mapping[float, float]
) -> dict[str, float] | None:
    """p50 and p99 (µs) of the decisions between two scrapes, interpolated inside a bucket as
    Prometheus does; None when there were none."""
    counts = [(bound, after[bound] - before.get(bound, 0.0)) for bound in sorted(after)]
    total = counts[-1][1] if counts else 0.0
    if not total:
        return None
    found = {}
    for percent in (50, 99):
        low, below = 0.0, 0.0
        for bound, upto in counts:
            if upto >= total * percent / 100:
                share = (total * percent / 100 - below) / (upto - below)
                found[f"p{percent}"] = 1e6 * (low + (bound - low) * share if bound < inf else low)
                break
            low, below = bound, upto
    return found


def summarize(
    outcomes: Mapping[str, Sequence[Outcome]],
    nominal_ttft_ms: float | None,
    nominal_tpot_ms: float | None,
    max_tokens: int,
) -> dict[str, Any]:
    """Spreads of every side in ms, and `added`: gateway minus baseline (or minus nominal), by
    percentile. `total_ms` goes from sending to the last byte."""
    sides: dict[str, Any] = {}
    for name, group in outcomes.items():
        ended = [outcome for outcome in group if outcome.status == "ok"]
        sides[name] = {
            "ok": len(ended),
            "failed": len(group) - len(ended),
            "ttft_ms": spread(outcome.ttft_from_sent for outcome in ended),
            "tpot_ms": spread(outcome.tpot for outcome in ended),
            "total_ms": spread(outcome.finished - outcome.sent for outcome in ended),
        }
    nominal = {"ttft_ms": nominal_ttft_ms, "tpot_ms": nominal_tpot_ms, "total_ms": None}
    if nominal_ttft_ms is not None and nominal_tpot_ms is not None:
        nominal["total_ms"] = nominal_ttft_ms + (max_tokens - 1) * nominal_tpot_ms
    added: dict[str, dict[str, float]] = {}
    for measure, value in nominal.items():
        gateway = sides["gateway"][measure]
        baseline = sides["baseline"][measure] if "baseline" in sides else None
        if gateway and (baseline or value is not None):
            added[measure] = {
                key: gateway[key] - (baseline[key] if baseline else value) for key in gateway
            }
    return {"sides": sides, "added": added}


def _deliver(report: dict[str, Any], json_out: Path | None) -> None:
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "max", title="Added by the gateway")
    for measure, values in report["added"].items():
        table.add_row(measure.removesuffix("_ms"), *(f"{value:.2f}" for value in values.values()))
    console = opt.deliver_json(report, json_out)
    console.print(table)
    if (took := report["decision_us"]) is not None:
        console.print(f"decision: p50 {took['p50']:.0f} µs, p99 {took['p99']:.0f} µs")
    failed = {name: side["failed"] for name, side in report["sides"].items() if side["failed"]}
    if failed:
        console.print(f"failed requests: {failed}", markup=False)
        raise typer.Exit(1)
