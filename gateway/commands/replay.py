"""`pressgate replay`: what policies would have done with recorded traffic, old against new."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.table import Table as Shown

from cache.documents import Documents
from gateway.commands.options import AsJson, CacheDir, ConfigFile, ModelName, settings_of
from gateway.commands.tables import wide_console
from gateway.commands.workshop import snapshot_of, workshop
from gateway.config import Settings
from gateway.policy.dryrun import Comparison, compare, policy_of
from gateway.policy.file import load_policies
from gateway.policy.inherit import resolve_all
from gateway.policy.matching import Table
from gateway.policy.policy import DEFAULT, Policy
from gateway.policy.replay import PolicyReport, replayed
from gateway.policy.replay import replay as run_replay
from gateway.policy.store import PolicyStore
from gateway.policy.trace import Arrival, read_trace, scaled
from gateway.variants.variant import LadderSnapshot

_SHOWN_MOVES = 20
_NUMBERS = (
    "requests",
    "attainment",
    "refused",
    "ppl ratio",
    "compute ms/token",
    "MB·s/token",
    "TTFT p95",
)


def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            help="CSV (TIMESTAMP,ContextTokens,GeneratedTokens) or a gateway's decision log."
        ),
    ],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="YAML of policies to try, before they are sent.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="YAML of the old ones; default: those now in force here."),
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
    """Run a trace on a simulated ladder with this machine's cards.

    With --policy: old policies against new ones, which requests change level, and what it costs.
    A log says who falls under which policy; of a CSV, which does not, each policy gets all of it.
    """
    settings = settings_of(config, model=model, cache_dir=cache_dir)
    arrivals = scaled(read_trace(trace, limit=limit), time=time_scale, length=length_scale)
    told = any(arrival.policy is not None for arrival in arrivals)
    old = asyncio.run(_in_force(settings)) if against is None else _by_name(load_policies(against))
    tried = load_policies(policy, elsewhere=old) if policy is not None else ()
    ladder = asyncio.run(_ladder(settings))
    before, after = _table(old), _table(old | _by_name(tried))
    if policy is None:
        _show_reports(_reports(arrivals, before, ladder, told=told), as_json=as_json)
        return
    names = [None] if told else [one.name for one in tried]
    found = [(name, compare(arrivals, before, after, ladder, name)) for name in names]
    if as_json:
        rows = [{"tried": name, **comparison.json()} for name, comparison in found]
        typer.echo(orjson.dumps({"comparisons": rows}, option=orjson.OPT_INDENT_2))
        return
    for name, comparison in found:
        _show_comparison(name, comparison)


async def _ladder(settings: Settings) -> LadderSnapshot:
    async with workshop(settings) as backend:
        return await snapshot_of(backend, settings.memory_budget)


async def _in_force(settings: Settings) -> dict[str, Policy]:
    """As they were written: the configuration's, overlaid by those set over HTTP here."""
    store = PolicyStore(settings.policies, Documents(settings.cache.root))
    await store.load()
    return store.written()


def _by_name(policies: Iterable[Policy]) -> dict[str, Policy]:
    return {policy.name: policy for policy in policies}


def _table(policies: Mapping[str, Policy]) -> Table:
    """With `default`, and with all that they inherit."""
    active, _ = resolve_all({DEFAULT.name: DEFAULT, **policies})
    return Table(active)


def _reports(
    arrivals: Sequence[Arrival], table: Table, ladder: LadderSnapshot, *, told: bool
) -> list[PolicyReport]:
    """One per policy: each alone with the whole trace, or (`told`) with its own requests."""
    if told:
        choose = partial(policy_of, table=table, model=ladder.model)
        return list(replayed(arrivals, table.ordered(), choose, ladder).reports)
    reports: list[PolicyReport] = []
    for policy in table.ordered():
        reports += run_replay([_under(policy, one) for one in arrivals], [policy], ladder)
    return reports


def _under(policy: Policy, arrival: Arrival) -> Arrival:
    sla = arrival.sla.model_copy(update={"policy": policy.name})
    return replace(arrival, sla=sla)


def _show_reports(reports: Sequence[PolicyReport], *, as_json: bool) -> None:
    if as_json:
        rows = {"policies": [report.json() for report in reports]}
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        return
    table = _columns("replay", ("policy",))
    for report in reports:
        table.add_row(report.policy, *_cells(report))
    wide_console().print(table)


def _show_comparison(name: str | None, comparison: Comparison) -> None:
    title = "old and new policies" if name is None else f"old and new: all under {name}"
    table = _columns(title, ("policy", "side"))
    for policy, old, new in comparison.policies():
        for side, report in (("old", old), ("new", new)):
            if report is not None:
                table.add_row(policy, side, *_cells(report))
    if name is None:
        table.add_section()
        table.add_row("all", "old", *_cells(comparison.old.total))
        table.add_row("all", "new", *_cells(comparison.new.total))
    console = wide_console()
    console.print(table)
    if comparison.as_recorded is not None:
        console.print(f"simulated as recorded: {comparison.as_recorded:.0%} of the levels")
    changed, requests = len(comparison.changes), comparison.new.total.requests
    console.print(f"{changed} of {requests} requests change level")
    for was, now, count in comparison.moves[:_SHOWN_MOVES]:
        console.print(f"  {was or 'refused'} → {now or 'refused'}: {count}")


def _columns(title: str, left: Sequence[str]) -> Shown:
    table = Shown(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in _NUMBERS:
        table.add_column(name, justify="right")
    table.add_column("levels")
    return table


def _cells(report: PolicyReport) -> list[str]:
    return [
        str(report.requests),
        f"{report.attainment:.1%}",
        str(sum(report.refusals.values())),
        _number(report.mean_ppl_ratio, ".4f"),
        _number(report.compute_ms_per_token, ".2f"),
        _number(report.memory_mb_s_per_token, ".2f"),
        f"{report.ttft_ms.get('p95', 0.0):.0f} ms",
        ", ".join(f"{level} {share:.0%}" for level, share in report.levels.items()),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
