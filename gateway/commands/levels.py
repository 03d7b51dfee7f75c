"""`pressgate levels` and `pressgate compress`: look at the ladder, build a level."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from compressors.export.formats import WRITERS
from compressors.recipe import Recipe, RecipeError
from compressors.report import parts_table, to_table
from gateway.commands.options import (
    AsJson,
    CacheDir,
    CalibrationFile,
    ConfigFile,
    EvalFile,
    ModelName,
    settings_of,
)
from gateway.commands.tables import card_table, wide_console
from gateway.commands.workshop import progress_bars, workshop
from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.variants.card import Card
from gateway.variants.jobs import BuildFailed


def levels(
    config: ConfigFile = None,
    model: ModelName = None,
    calibration: CalibrationFile = None,
    eval_text: EvalFile = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Show the ladder: every level, whether it exists, and its card for these texts."""
    settings = settings_of(
        config, model=model, calibration=calibration, eval_text=eval_text, cache_dir=cache_dir
    )
    rows = asyncio.run(_levels(settings))
    if as_json:
        typer.echo(orjson.dumps({"levels": rows}, option=orjson.OPT_INDENT_2))
        return
    cards = [(row["level"], row["state"], Card.model_validate(row)) for row in rows]
    table = card_table("levels", cards)
    table.columns[1].header = "state"
    wide_console().print(table)


async def _levels(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    async with workshop(settings) as backend:
        for spec in backend.ladder():
            stored = await backend.stored(spec.level)
            facts = {"level": spec.level, "family": spec.family}
            state = {"state": "stored" if stored else "absent"}
            rows.append(facts | state | backend.card(spec.level).model_dump(mode="json"))
    return rows


def compress(
    level: Annotated[str, typer.Option("--level", help="Which level, e.g. int4-gptq-g128.")],
    config: ConfigFile = None,
    model: ModelName = None,
    calibration: CalibrationFile = None,
    eval_text: EvalFile = None,
    cache_dir: CacheDir = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write it as a checkpoint folder for others here.")
    ] = None,
    export_format: Annotated[
        str, typer.Option("--format", help=f"Of the export: {' or '.join(WRITERS)}.")
    ] = next(iter(WRITERS)),
    as_json: AsJson = False,
) -> None:
    """Build one level into the cache, measure its card and print both."""
    level = level.strip()
    try:
        offered = Recipe.parse(level).offers[0].name  # of two levels in one artifact the better
    except RecipeError as error:
        raise InvalidRequest(f"--level takes one level: {error}", param="level") from None
    _check_export(Recipe.parse(level), export, export_format)
    settings = settings_of(
        config,
        model=model,
        levels=level,
        calibration=calibration,
        eval_text=eval_text,
        cache_dir=cache_dir,
    )
    facts = asyncio.run(_compress(settings, offered, export, export_format))
    if as_json:
        typer.echo(orjson.dumps(facts, option=orjson.OPT_INDENT_2))
        return
    console = wide_console()
    report = facts.pop("report")
    console.print(card_table("built", [(level, facts["family"], Card.model_validate(facts))]))
    if report:
        console.print(to_table(report))
        console.print(parts_table(report.get("parts", {})))


def _check_export(recipe: Recipe, folder: Path | None, form: str) -> None:
    """What can be said before the level is built.

    Raises:
        InvalidRequest: naming the flag.
    """
    if form not in WRITERS:
        raise InvalidRequest(
            f"--format: {form!r} is no format; known: {', '.join(WRITERS)}", param="format"
        )
    if folder is None:
        return
    if folder.exists():
        raise InvalidRequest(f"--export: {folder} exists", param="export")
    if not recipe.steps:
        raise InvalidRequest(
            f"--export: {recipe.name} is dense, no linear is compressed; there is nothing to write",
            param="export",
        )
    if (cache := recipe.step("kv")) is not None:
        raise InvalidRequest(
            f"--export: {cache.name} is how the KV cache is kept, not how weights are; "
            "export the level without it",
            param="export",
        )


async def _compress(
    settings: Settings, level: str, export: Path | None, export_format: str
) -> dict[str, Any]:
    async with workshop(settings) as backend:
        families = {spec.level: spec.family for spec in backend.ladder()}
        if families.get(level, "upstream") == "upstream":
            own = ", ".join(name for name, kind in families.items() if kind != "upstream")
            raise InvalidRequest(
                f"--level: {backend.model} cannot be built as {level}; it has {own}", param="level"
            )
        family = families[level]
        expected = backend.forecast(level)
        if not await backend.stored(level):
            typer.echo(
                f"{level}: about {expected.peak_bytes / 1e6:.0f} MB of memory and "
                f"{backend.card(level).build_seconds:.0f} s to build",
                err=True,
            )
        with progress_bars() as bars:
            task = bars.add_task(level, total=1.0)
            try:
                await backend.build(
                    level,
                    lambda share, message: bars.update(
                        task, completed=share, description=f"{level}: {message}"
                    ),
                )
            except BuildFailed as error:
                raise InvalidRequest(str(error), param="level") from error
        facts = {"level": level, "family": family} | backend.card(level).model_dump(mode="json")
        facts["report"] = await backend.report(level)
        if export is not None:
            facts["exported"] = await backend.export(level, export, export_format)
        return facts
