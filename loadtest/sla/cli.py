"""`python -m loadtest sla`: a study of promises kept, one command.

Exit status: 1 when a system could not be run, 2 for bad input.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from loadtest import options as opt
from loadtest.compare import markdown
from loadtest.machine import provenance
from loadtest.mix import BadInput
from loadtest.peers.child import EngineError
from loadtest.sla import show
from loadtest.sla.play import Scene, prepare, run_once
from loadtest.sla.study import Study, load_study
from loadtest.sla.systems import System, systems
from loadtest.workloads import MAX_REQUESTS, TraceScale, trace

DEFAULT: Final = Path(__file__).parents[1] / "studies" / "classes.yaml"
_AS_RECORDED: Final = TraceScale()


def command(
    *,
    traces: Annotated[
        list[Path],
        typer.Option("--trace", help="Azure LLM trace (CSV); several are played in turn by seed."),
    ],
    study: Annotated[Path, typer.Option(help="What is compared: a YAML file.")] = DEFAULT,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Windows of the traces.")] = 5,
    only: Annotated[str, typer.Option(help="Comma-separated systems; empty: all.")] = "",
    cache: Annotated[Path, typer.Option(help="Folder for the built levels; kept.")] = Path(
        "~/.cache/pressgate-sla"
    ),
    json_out: opt.JsonOut = None,
    markdown_out: Annotated[Path | None, typer.Option("--markdown")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot here.")] = None,
) -> None:
    """Play request traces against fixed levels, a greedy chooser, Pressgate and its ablations."""
    if find_spec("scipy") is None:
        raise BadInput("sla: needs scipy: pip install 'pressgate[study]'")
    for file, flag in ((json_out, "--json"), (markdown_out, "--markdown"), (png, "--png")):
        opt.check_writable(file, flag)
    wanted = load_study(study)
    chosen = _chosen(systems(wanted), only)
    rows = [trace(path, _AS_RECORDED, float("inf"), MAX_REQUESTS) for path in traces]
    folder = cache.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    console = Console(stderr=True)
    try:
        prepare(wanted, folder / "built")
        runs = []
        for seed in range(seeds):
            scene = Scene(wanted, rows[seed % len(rows)], folder / "built")
            runs += [_run(scene, system, seed, console) for system in _turned(chosen, seed)]
    except EngineError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    report = provenance(started) | {"study": wanted.model_dump(mode="json"), "runs": runs}
    report |= show.gather(runs)
    _deliver(report, wanted, json_out, markdown_out, png)


def _run(scene: Scene, system: System, seed: int, console: Console) -> dict[str, Any]:
    found = run_once(scene, system, seed)
    console.print(
        f"seed {seed} {system.name}: {found[show.GOAL]:.2f} /s quality-weighted, "
        f"attainment {found['attainment'] or 0.0:.1%}",
        markup=False,
        highlight=False,
    )
    return found


def _chosen(every: list[System], only: str) -> list[System]:
    """
    Raises:
        BadInput: a name that is no system, or a choice without Pressgate and a fixed level.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {system.name for system in every}
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"--only: {unknown[0]!r} is none of {', '.join(sorted(known))}")
    chosen = [system for system in every if not names or system.name in names]
    if not {"fixed", "pressgate"} <= {system.kind for system in chosen}:
        raise BadInput("--only: pressgate and at least one fixed level are needed to compare")
    return chosen


def _turned(chosen: list[System], seed: int) -> list[System]:
    """Every seed begins with another system: a machine that drifts favours nobody."""
    at = seed % len(chosen)
    return chosen[at:] + chosen[:at]


def _deliver(
    report: dict[str, Any],
    study: Study,
    json_out: Path | None,
    markdown_out: Path | None,
    png: Path | None,
) -> None:
    report["systems"] = {
        system.name: report["systems"][system.name]
        for system in systems(study)
        if system.name in report["systems"]
    }
    console = opt.deliver_json(report, json_out)
    text = markdown.document("Promises kept", report, show.tables(report))
    console.print(text, markup=False, highlight=False)
    if markdown_out is not None:
        markdown_out.write_text(text + "\n", encoding="utf-8")
    if png is not None:
        show.plot(report, png)
