"""`pressgate search`: find the ladder. Builds candidate recipes, keeps those nothing else beats."""

from __future__ import annotations

import asyncio
from typing import Annotated

import orjson
import typer

from compressors.estimate import estimate
from compressors.recipe import Recipe
from gateway.commands.frontier import pareto
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
from gateway.config import LADDERS, Settings
from gateway.variants.card import Card
from gateway.variants.jobs import BuildFailed

# From near lossless to small: one or more of every family and the stacks that pay.
CANDIDATES = (
    "int8",
    "int4-rtn-g64",
    "int4-hqq-g64",
    "int4-gptq-g64",
    "int4-gptq-g128",
    "int3-gptq-g64",
    "int2-gptq-g64",
    "sparse24-wanda",
    "sparse24-wanda+int8",
    "lowrank-80",
    "depth-88+int8",
    "depth-75",
    "depth-75+int4-gptq-g128",
)


def search(
    config: ConfigFile = None,
    model: ModelName = None,
    calibration: CalibrationFile = None,
    eval_text: EvalFile = None,
    cache_dir: CacheDir = None,
    max_ppl_ratio: Annotated[
        float, typer.Option(help="Leave out recipes worse than this.", min=1.0)
    ] = 2.0,
    candidates: Annotated[
        str | None, typer.Option(help="Comma-separated recipes to try instead of the usual ones.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Time every candidate too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search the best levels for this model; `levels: auto` then serves them.

    Candidates are tried from the one expected to lose least; trying stops where the estimate says
    that no further one can stay under the bound.
    """
    names = CANDIDATES if candidates is None else tuple(candidates.split(","))
    settings = settings_of(
        config,
        model=model,
        levels=",".join(names),
        calibration=calibration,
        eval_text=eval_text,
        cache_dir=cache_dir,
    )
    rows, chosen = asyncio.run(_search(settings, max_ppl_ratio, speed))
    if as_json:
        found = [{"level": level, **card.model_dump(mode="json")} for level, _, card in rows]
        typer.echo(orjson.dumps({"ladder": chosen, "tried": found}, option=orjson.OPT_INDENT_2))
        return
    wide_console().print(card_table("tried", rows))
    wide_console().print(f"ladder: {', '.join(chosen)}", highlight=False)


async def _search(
    settings: Settings, bound: float, speed: bool
) -> tuple[list[tuple[str, str, Card]], list[str]]:
    from gateway.app import open_backends

    rows: list[tuple[str, str, Card]] = []
    async with workshop(settings) as backend:
        own = [spec for spec in backend.ladder() if spec.family != "upstream"]
        ladder = sorted(own, key=lambda spec: estimate(Recipe.parse(spec.level)).perplexity_ratio)
        with progress_bars() as bars:
            for spec in ladder:
                # An estimate may be off by half of what it says is lost; beyond that, do not try.
                if estimate(Recipe.parse(spec.level)).perplexity_ratio - 1 > 2 * (bound - 1):
                    continue
                task = bars.add_task(spec.level, total=1.0)
                try:
                    card = await backend.measure(
                        spec.level,
                        lambda share, _, task=task: bars.update(task, completed=share),  # type: ignore[misc]
                        speed=speed,
                    )
                except BuildFailed as error:
                    bars.console.print(f"{spec.level}: {error}", markup=False)
                    continue
                finally:
                    bars.remove_task(task)
                if speed:
                    await backend.remember(spec.level, card)
                if card.perplexity_ratio <= bound:
                    rows.append((spec.level, spec.family, card))
    chosen = pareto(rows)[::-1]
    async with open_backends(settings) as parts:
        await parts.documents.put(LADDERS, backend.model, {"levels": chosen})
    return rows, chosen
