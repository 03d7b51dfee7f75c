"""`pressgate cache …`: look after the artifacts on this disk. No gateway needs to run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from cache.disk import QUARANTINE_SECONDS, DiskStore
from cache.errors import CacheError
from gateway.commands.options import AsJson, CacheDir, ConfigFile, settings_of
from gateway.commands.tables import wide_console
from gateway.errors import InvalidRequest

app = typer.Typer(no_args_is_help=True)


@app.command()
def ls(config: ConfigFile = None, cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List artifacts and what they take."""
    store = _store(config, cache_dir)
    rows = []
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        manifest = store.manifest(key)
        if manifest is not None:
            rows.append(
                {
                    "model": manifest.model,
                    "level": manifest.recipe,
                    "bytes": manifest.total_bytes,
                    "build_seconds": manifest.build_seconds,
                    "key": key,
                }
            )
    usage = asdict(store.usage())
    if as_json:
        typer.echo(orjson.dumps({"artifacts": rows, "usage": usage}, option=orjson.OPT_INDENT_2))
        return
    table = Table(caption=f"{usage['blob_bytes'] / 1e6:.1f} of {usage['budget'] / 1e6:.0f} MB")
    for name in ("model", "level", "MB", "built in s", "key"):
        table.add_column(name, justify="right" if name in ("MB", "built in s") else "left")
    for row in sorted(rows, key=lambda row: (str(row["model"]), str(row["level"]))):
        table.add_row(
            str(row["model"]),
            str(row["level"]),
            f"{_number(row['bytes']) / 1e6:.1f}",
            f"{_number(row['build_seconds']):.1f}",
            str(row["key"])[:16],
        )
    wide_console().print(table)


@app.command()
def verify(config: ConfigFile = None, cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Read everything and check every digest; damage goes to quarantine. Exit code 1 if any."""
    report = asdict(_store(config, cache_dir).verify())
    _say(report, as_json)
    if report["corrupt"]:
        raise typer.Exit(1)


@app.command()
def gc(
    config: ConfigFile = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quarantine_seconds: Annotated[
        float, typer.Option(help="Keep damaged files this long for inspection.")
    ] = QUARANTINE_SECONDS,
) -> None:
    """Remove blobs that nothing names, leftovers of dead builds and old quarantine."""
    report = _store(config, cache_dir).gc(quarantine_seconds=quarantine_seconds)
    _say(asdict(report), as_json)


def _store(config: Any, cache_dir: Any) -> DiskStore:
    settings = settings_of(config, cache_dir=cache_dir)
    try:
        return DiskStore(settings.cache.root, settings.cache.disk_budget)
    except CacheError as error:
        raise InvalidRequest(f"--cache-dir: {error}", param="cache_dir") from error


def _say(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2))
        return
    for name, value in report.items():
        text = ", ".join(value) if isinstance(value, (list, tuple)) else value
        typer.echo(f"{name.replace('_', ' ')}: {text or 0}")


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
