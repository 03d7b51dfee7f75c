"""The `overhead` command: what a gateway adds to the server behind it.

Either against a baseline (the same requests straight to the server behind, in alternating rounds so
that a drifting machine touches both), or against an engine of known speed (`pressgate serve` with a
fake model): then what is above the nominal times is the gateway's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from loadtest import options as opt
from loadtest.client import Client, Outcome, Target
from loadtest.machine import provenance
from loadtest.mix import BadInput, Goals, Lengths, single_class
from loadtest.report import spread
from loadtest.runner import Bounds, run_closed
from loadtest.workloads import DefaultLengths, TextPrompts, closed, plan

ROUNDS = 2
_Nominal = Annotated[float | None, typer.Option(min=0.0, help="Known time of the fake engine.")]


def command(
    *,
    url: opt.Url = "http://127.0.0.1:8000",
    model: opt.ModelName = "fake",
    baseline_url: Annotated[str | None, typer.Option(help="The server behind.")] = None,
    nominal_ttft_ms: _Nominal = None,
    nominal_tpot_ms: _Nominal = None,
    users: Annotated[int, typer.Option(min=1, max=1000)] = 16,
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
    outcomes = asyncio.run(_measure(targets, users, requests, max_tokens, seed))
    report = provenance(started) | {"users": users, "requests": requests}
    report |= summarize(outcomes, nominal_ttft_ms, nominal_tpot_ms)
    _deliver(report, json_out)


async def _measure(
    targets: dict[str, Target], users: int, requests: int, max_tokens: int, seed: int
) -> dict[str, list[Outcome]]:
    collected: dict[str, list[Outcome]] = {name: [] for name in targets}
    lengths = DefaultLengths(
        prompt=Lengths(low=32, high=32), output=Lengths(low=max_tokens, high=max_tokens)
    )
    for part in range(ROUNDS):
        for name, target in targets.items():
            rng = np.random.default_rng([seed, part])
            arrivals = closed(max(1, requests // ROUNDS))
            mix = single_class(Goals())
            planned = plan(arrivals, mix, TextPrompts.from_words(rng), lengths, rng)
            async with Client(target) as client:
                run = await run_closed(client, planned, users, Bounds(3600, 60), lambda _: None)
            collected[name] += run.outcomes
    return collected


def summarize(
    outcomes: Mapping[str, Sequence[Outcome]],
    nominal_ttft_ms: float | None,
    nominal_tpot_ms: float | None,
) -> dict[str, Any]:
    """Spreads of every side in ms, and `added`: gateway minus baseline (or minus nominal), by
    percentile."""
    sides: dict[str, Any] = {}
    for name, group in outcomes.items():
        ended = [outcome for outcome in group if outcome.status == "ok"]
        sides[name] = {
            "ok": len(ended),
            "failed": len(group) - len(ended),
            "ttft_ms": spread(outcome.ttft_from_sent for outcome in ended),
            "tpot_ms": spread(outcome.tpot for outcome in ended),
        }
    nominal = {"ttft_ms": nominal_ttft_ms, "tpot_ms": nominal_tpot_ms}
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
    failed = {name: side["failed"] for name, side in report["sides"].items() if side["failed"]}
    if failed:
        console.print(f"failed requests: {failed}", markup=False)
        raise typer.Exit(1)
