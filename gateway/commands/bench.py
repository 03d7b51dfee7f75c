"""`pressgate bench`: the standard benchmark. Every level on the same text and the same machine."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

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

_VERSIONED = ("pressgate", "torch", "transformers")
Row = tuple[str, str, Card]


def bench(
    config: ConfigFile = None,
    model: ModelName = None,
    levels: LevelNames = "all",
    calibration: CalibrationFile = None,
    eval_text: EvalFile = None,
    cache_dir: CacheDir = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here ('-': stdout).")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw size, quality and speed here.")] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Skip timing.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print the README's table.")] = False,
) -> None:
    """Build what is missing, then measure size, speed and quality of every level."""
    for name, file in (("--json", json_file), ("--png", png)):
        if file is not None and str(file) != "-":
            check_output(name, file)
    settings = settings_of(
        config,
        model=model,
        levels=levels,
        calibration=calibration,
        eval_text=eval_text,
        cache_dir=cache_dir,
    )
    served, rows = asyncio.run(_bench(settings, speed=not no_speed))
    result = _result(served, rows, settings)
    if json_file is not None and str(json_file) == "-":
        typer.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    elif markdown:
        typer.echo(markdown_table(rows))
    else:
        wide_console().print(card_table(f"{served}: benchmark", rows))
    if json_file is not None and str(json_file) != "-":
        json_file.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    if png is not None:
        from gateway.commands.frontier import draw_frontier

        draw_frontier(served, rows, png)


async def _bench(settings: Settings, *, speed: bool) -> tuple[str, list[Row]]:
    rows: list[Row] = []
    async with workshop(settings) as backend:
        ladder = [spec for spec in backend.ladder() if spec.family != "upstream"]
        with progress_bars() as bars:
            whole = bars.add_task("all levels", total=len(ladder))
            for spec in ladder:
                task = bars.add_task(spec.level, total=1.0)

                def show(
                    share: float, message: str, task: Any = task, name: str = spec.level
                ) -> None:
                    bars.update(task, completed=share, description=f"{name}: {message}")

                try:
                    card = await backend.measure(spec.level, show, speed=speed)
                except BuildFailed as error:
                    raise InvalidRequest(f"{spec.level}: {error}", param="levels") from error
                if speed:  # an untimed card must not replace a timed one
                    await backend.remember(spec.level, card)
                rows.append((spec.level, spec.family, card))
                bars.remove_task(task)
                bars.advance(whole)
    return backend.model, rows


def _result(served: str, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """The benchmark's JSON: host, versions, model and one object per level."""
    return {
        "host": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": settings.threads or os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        "model": served,
        "eval_text": str(settings.build.eval_text or "default"),
        "calibration": str(settings.build.calibration or "default"),
        "levels": [
            {"level": level, "family": family} | card.model_dump(mode="json")
            for level, family, card in rows
        ],
    }


def markdown_table(rows: Sequence[Row]) -> str:
    """The table of the README."""
    lines = [
        "| level | stored MB | ratio | decode tok/s ×1 | ×8 | speed-up | perplexity ratio | "
        "KL (nats) | top-1 agreement | build s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for level, _, card in rows:
        one, eight = (card.decode_tokens_per_s.get(b, 0.0) for b in ("1", "8"))
        lines.append(
            f"| `{level}` | {card.stored_bytes / 1e6:.1f} | {card.compression_ratio:.2f} "
            f"| {one:.0f} | {eight:.0f} | {card.speedup:.2f} | {card.perplexity_ratio:.4f} "
            f"| {card.kl_nats:.4f} | {card.top1_agreement:.3f} | {card.build_seconds:.1f} |"
        )
    return "\n".join(lines)
