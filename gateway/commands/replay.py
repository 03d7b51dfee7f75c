"""`pressgate replay`: what policies would have done with recorded traffic."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.table import Table

from gateway.commands.options import AsJson, CacheDir, ConfigFile, ModelName, settings_of
from gateway.commands.tables import wide_console
from gateway.commands.workshop import snapshot_of, workshop
from gateway.config import Settings
from gateway.policy.budget import Sla
from gateway.policy.file import load_policies
from gateway.policy.replay import PolicyReport
from gateway.policy.replay import replay as run_replay
from gateway.policy.trace import read_trace, scaled
from gateway.variants.variant import LadderSnapshot


def replay(
    trace: Annotated[Path, typer.Argument(help="CSV: TIMESTAMP,ContextTokens,GeneratedTokens.")],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="YAML of policies; default: the config's.")
    ] = None,
    config: ConfigFile = None,
    model: ModelName = None,
    cache_dir: CacheDir = None,
    limit: Annotated[int, typer.Option(help="Requests to take from the trace.", min=1)] = 10_000,
    time_scale: Annotated[float, typer.Option(help="0.5: twice as fast.", min=1e-6, max=1e6)] = 1.0,
    length_scale: Annotated[
        float, typer.Option(help="0.1: a tenth of the tokens.", min=1e-6, max=1e6)
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Run a trace through every policy on a simulated ladder with this machine's cards."""
    settings = settings_of(config, model=model, cache_dir=cache_dir)
    policies = load_policies(policy) if policy is not None else settings.policies
    arrivals = scaled(read_trace(trace, limit=limit), time=time_scale, length=length_scale)
    ladder = asyncio.run(_ladder(settings))
    reports: list[PolicyReport] = []
    for one in policies:
        named = [replace(arrival, sla=Sla(policy=one.name)) for arrival in arrivals]
        reports += run_replay(named, [one], ladder)
    if as_json:
        rows = {"policies": [report.json() for report in reports]}
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        return
    wide_console().print(_table(reports))


async def _ladder(settings: Settings) -> LadderSnapshot:
    async with workshop(settings) as backend:
        return await snapshot_of(backend, settings.memory_budget)


def _table(reports: list[PolicyReport]) -> Table:
    table = Table(title="replay", title_justify="left")
    for name in ("policy", "requests", "attainment", "refused", "ppl ratio", "TTFT p95", "levels"):
        table.add_column(name, justify="left" if name in ("policy", "levels") else "right")
    for report in reports:
        ratio = "–" if report.mean_ppl_ratio is None else f"{report.mean_ppl_ratio:.4f}"
        table.add_row(
            report.policy,
            str(report.requests),
            f"{report.attainment:.1%}",
            str(sum(report.refusals.values())),
            ratio,
            f"{report.ttft_ms.get('p95', 0.0):.0f} ms",
            ", ".join(f"{level} {share:.0%}" for level, share in report.levels.items()),
        )
    return table
