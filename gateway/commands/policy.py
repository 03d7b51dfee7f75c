"""`pressgate policy …`: check a file of policies, send it to a gateway, show what one uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from gateway.commands.http import call, gateway_answers
from gateway.commands.options import DEFAULT_URL, AsJson, Key, Url
from gateway.commands.tables import wide_console
from gateway.policy.file import load_policies

app = typer.Typer(no_args_is_help=True)
PolicyFile = Annotated[Path, typer.Argument(help="YAML: a list of policies, one, or a config.")]


@app.command()
def validate(file: PolicyFile) -> None:
    """Check a file; exit code 2 and the line at fault if it is wrong."""
    for policy in load_policies(file):
        typer.echo(f"{policy.name}: ok")


@app.command()
def apply(file: PolicyFile, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Send every policy of a file to a running gateway and its replicas."""
    for policy in load_policies(file):
        document = policy.model_dump(mode="json", exclude_defaults=True)
        call("PUT", url, f"/v1/policies/{policy.name}", api_key, document)
        typer.echo(f"{policy.name}: applied")


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="One policy; default: all.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show the policies a running gateway uses."""
    answer = call("GET", url, f"/v1/policies/{name}" if name else "/v1/policies", api_key)
    if as_json:
        typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))
        return
    with gateway_answers(url):
        table = _table([answer] if name else answer["data"])
    wide_console().print(table)


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = [key for key in rows[0] if key not in ("name", "match", "object")]
    table = Table()
    for column in ("name", *shown):
        table.add_column(column)
    for row in rows:
        cells = [row.get(column) for column in shown]
        table.add_row(row["name"], *("–" if c in (None, [], {}) else str(c) for c in cells))
    return table
