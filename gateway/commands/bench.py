"""`pressgate bench`: the standard benchmark. Every level on the same text and the same machine."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.markup import escape

from gateway.commands.markdown import check_markers, section, splice, table
from gateway.commands.options import (
    CacheDir,
    CalibrationFile,
    ConfigFile,
    EvalFile,
    LevelNames,
    ModelName,
    check_output,
    settings_of,
)
from gateway.commands.tables import card_table, wide_console
from gateway.commands.workshop import progress_bars, workshop
from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.variants.card import Card
from gateway.variants.cards import processor_name
from gateway.variants.jobs import BuildFailed

if TYPE_CHECKING:
    from rich.progress import Progress

    from gateway.variants.local_backend import LocalBackend

_VERSIONED = ("pressgate", "torch", "transformers")
Row = tuple[str, str, Card]


@dataclass
class Outcome:
    """What was measured, and what could not be built and why."""

    model: str = ""
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def bench(
    config: ConfigFile = None,
    model: ModelName = None,
    levels: LevelNames = None,
    calibration: CalibrationFile = None,
    eval_text: EvalFile = None,
    cache_dir: CacheDir = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here ('-': stdout).")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw size, quality and speed here.")] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Skip timing.")] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Measure again what was measured under equal conditions."),
    ] = False,
    markdown: Annotated[bool, typer.Option(help="Print the README's table.")] = False,
    readme: Annotated[
        Path | None,
        typer.Option(help="Put the table between the <!-- levels --> markers of this file."),
    ] = None,
) -> None:
    """Build what is missing, then measure size, speed and quality of every level.

    May be stopped and run again: levels that were measured are not measured again.
    """
    for name, file in (("--json", json_file), ("--png", png)):
        if file is not None and str(file) != "-":
            check_output(name, file)
    if readme is not None:
        check_markers(readme)
    settings = settings_of(
        config,
        model=model,
        levels=levels,
        calibration=calibration,
        eval_text=eval_text,
        cache_dir=cache_dir,
    )
    # Builds give way to traffic; here there is none, and what is measured must not wait for others.
    alone = settings.build.model_copy(update={"nice": 0})
    settings = settings.model_copy(update={"build": alone})
    outcome = asyncio.run(_bench(settings, speed=not no_speed, fresh=fresh))
    result = _result(outcome, settings)
    if json_file is not None and str(json_file) == "-":
        typer.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    elif markdown:
        typer.echo(table(outcome.rows, outcome.failed))
    else:
        _show(outcome)
    if json_file is not None and str(json_file) != "-":
        json_file.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    if png is not None:
        from gateway.commands.frontier import draw_frontier

        draw_frontier(outcome.model, outcome.rows, png)
    if readme is not None:
        picture = None if png is None else os.path.relpath(png, readme.parent)
        splice(readme, section(result, table(outcome.rows, outcome.failed), picture))


def _show(outcome: Outcome) -> None:
    shown = card_table(f"{outcome.model}: benchmark", outcome.rows)
    if outcome.failed:
        shown.caption = "\n".join(
            f"{escape(level)}: {escape(reason)}" for level, reason in outcome.failed.items()
        )
    wide_console().print(shown)


async def _bench(settings: Settings, *, speed: bool, fresh: bool) -> Outcome:
    outcome = Outcome()
    async with workshop(settings) as backend:
        outcome.model = backend.model
        ladder = [spec for spec in backend.ladder() if spec.family != "upstream"]
        with progress_bars() as bars:
            whole = bars.add_task("all levels", total=len(ladder))
            # The lightest first: they may draft for the others, whose cards say how fast that is.
            order = sorted(ladder, key=lambda spec: backend.card(spec.level).resident_bytes)
            for index, spec in enumerate(order):
                known = None if fresh else _known(backend, spec.level)
                try:
                    card = known or await _measured(backend, spec.level, bars, speed=speed)
                except BuildFailed as error:
                    outcome.failed[spec.level] = str(error)
                    said = f"not built: {error}"
                else:
                    outcome.rows.append((spec.level, spec.family, card))
                    said = f"perplexity ratio {card.perplexity_ratio:.4f}"
                    said += " (measured before)" if known else ""
                bars.advance(whole)
                if bars.disable:  # nobody watches bars: leave a trace in the log
                    typer.echo(f"[{index + 1}/{len(ladder)}] {spec.level}: {said}", err=True)
        places = {spec.level: place for place, spec in enumerate(ladder)}
        outcome.rows.sort(key=lambda row: places[row[0]])
    if not outcome.rows:
        level, reason = next(iter(outcome.failed.items()))
        raise InvalidRequest(f"{level}: {reason}", param="levels")
    return outcome


def _known(backend: LocalBackend, level: str) -> Card | None:
    """The level's card if this host measured all of it before, under the same conditions."""
    card = backend.card(level)
    return card if card.measured and card.perplexity_ratio_low is not None else None


async def _measured(backend: LocalBackend, level: str, bars: Progress, *, speed: bool) -> Card:
    task = bars.add_task(level, total=1.0)
    try:
        card = await backend.measure(
            level,
            lambda share, message: bars.update(
                task, completed=share, description=f"{level}: {message}"
            ),
            speed=speed,
        )
    finally:
        bars.remove_task(task)
    if speed:  # an untimed card must not replace a timed one
        await backend.remember(level, card)
    return card


def _result(outcome: Outcome, settings: Settings) -> dict[str, Any]:
    """The benchmark's JSON: host, versions, model and one object per level."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "host": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": settings.threads or os.cpu_count(),
            "build_threads": settings.build.threads,
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        "model": outcome.model,
        "eval_text": str(settings.build.eval_text or "default"),
        "calibration": str(settings.build.calibration or "default"),
        "levels": [
            {"level": level, "family": family} | card.model_dump(mode="json")
            for level, family, card in outcome.rows
        ],
        "failed": outcome.failed,
    }
