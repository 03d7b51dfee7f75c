"""`pressgate policy …`: check a file of policies, send it to a gateway, show what one uses, and go
through versions and candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import orjson
import typer
from rich.table import Table

from gateway.commands.http import call, gateway_answers
from gateway.commands.options import DEFAULT_URL, AsJson, Key, Url
from gateway.commands.tables import wide_console
from gateway.policy.file import load_policies
from gateway.policy.inherit import parents_first
from gateway.policy.parse import written

app = typer.Typer(no_args_is_help=True)
PolicyFile = Annotated[Path, typer.Argument(help="YAML: a list of policies, one, or a config.")]
Name = Annotated[str, typer.Argument(help="A policy.")]
Comment = Annotated[str | None, typer.Option("--comment", help="Why; kept with the version.")]
_SHOWN = ("version", "at", "author", "kind", "of", "comment")


@app.command()
def validate(file: PolicyFile) -> None:
    """Check a file; exit code 2 and the line at fault if it is wrong."""
    for policy in load_policies(file):
        typer.echo(f"{policy.name}: ok")


@app.command()
def apply(
    file: PolicyFile,
    canary: Annotated[
        float | None,
        typer.Option(help="Percent of each policy's requests to try it on.", min=1e-6, max=99.9),
    ] = None,
    comment: Comment = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Send every policy of a file to a running gateway and its replicas."""
    policies = load_policies(file, elsewhere=None)
    for policy in parents_first({policy.name: policy for policy in policies}):
        document = written(policy)
        if canary is None:
            path = _path(policy.name, **({"comment": comment} if comment else {}))
            call("PUT", url, path, api_key, document)
            typer.echo(f"{policy.name}: applied")
            continue
        body = {"policy": document, "percent": canary, "comment": comment}
        call("POST", url, _path(policy.name + ":canary"), api_key, body)
        typer.echo(f"{policy.name}: tried on {canary:g} % of its requests")


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="One policy; default: all.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show the policies a running gateway uses, with all that they inherit."""
    answer = call("GET", url, _path(name) if name else "/v1/policies", api_key)
    if as_json:
        _print(answer)
        return
    with gateway_answers(url):
        table = _table([answer] if name else answer["data"])
    wide_console().print(table)


@app.command()
def history(
    name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False
) -> None:
    """Who changed a policy, when and why; * is in force."""
    answer = call("GET", url, _path(name, "versions"), api_key)
    if as_json:
        _print(answer)
        return
    with gateway_answers(url):
        table = Table()
        for column in _SHOWN:
            table.add_column(column)
        for row in answer["data"]:
            mark = " *" if row["in_force"] else ""
            cells = [_cell(row[column]) for column in _SHOWN[1:]]
            table.add_row(f"{row['version']}{mark}", *cells)
    wide_console().print(table)


@app.command()
def diff(
    name: Name,
    older: Annotated[
        int | None, typer.Option("--from", help="Default: the version before.", min=0)
    ] = None,
    newer: Annotated[int | None, typer.Option("--to", help="Default: the newest.", min=0)] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show what changed between two versions of a policy, field by field."""
    given = {"from": older, "to": newer}
    asked = {key: value for key, value in given.items() if value is not None}
    answer = call("GET", url, _path(name, "diff", **asked), api_key)
    if as_json:
        _print(answer)
        return
    with gateway_answers(url):
        lines = [f"{name}: version {_cell(answer['from'])} → {answer['to']}"]
        for change in answer["changes"]:
            for sign, side in (("-", "from"), ("+", "to")):
                if side in change:
                    value = orjson.dumps(change[side]).decode()
                    lines.append(f"{sign} {change['field']}: {value}")
    typer.echo("\n".join(lines))


@app.command()
def rollback(
    name: Name,
    version: Annotated[int, typer.Argument(help="0: what the configuration holds.", min=0)],
    comment: Comment = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Put an earlier version of a policy in force again."""
    body = {"version": version, "comment": comment}
    _end(url, name, "rollback", api_key, body, f"as in version {version}")


@app.command()
def canary(
    name: Name, url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False
) -> None:
    """Show how the candidate of a policy does beside the one in force."""
    answer = call("GET", url, _path(name, "canary"), api_key)
    if as_json:
        _print(answer)
        return
    with gateway_answers(url):
        table = Table(title=f"{name}: version {answer['version']} on {answer['percent']:g} %")
        for column in ("arm", "requests", "attainment"):
            table.add_column(column)
        for arm in ("stable", "canary"):
            share = answer[arm]["attainment"]
            shown = "–" if share is None else f"{share:.1%}"
            table.add_row(arm, str(answer[arm]["requests"]), shown)
        low, high = answer["drop"]["low"], answer["drop"]["high"]
        verdict = (
            f"attainment falls by {low:.1%} to {high:.1%}; at most {answer['max_drop']:.1%} may: "
            f"{answer['state']}"
        )
    console = wide_console()
    console.print(table)
    console.print(verdict)


@app.command()
def promote(
    name: Name, comment: Comment = None, url: Url = DEFAULT_URL, api_key: Key = None
) -> None:
    """Put the candidate of a policy in force for every request."""
    _end(url, name, "promote", api_key, {"comment": comment}, "the candidate is in force")


@app.command()
def abort(name: Name, comment: Comment = None, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Drop the candidate of a policy."""
    _end(url, name, "abort", api_key, {"comment": comment}, "the candidate is dropped")


def _end(
    url: str, name: str, verb: str, api_key: str | None, body: dict[str, Any], said: str
) -> None:
    answer = call("POST", url, _path(f"{name}:{verb}"), api_key, body)
    with gateway_answers(url):
        number = answer["version"]
    typer.echo(f"{name}: {said} (version {number})")


def _path(name: str, *below: str, **query: Any) -> str:
    """A policy's address; whatever was typed as its name stays one part of the path."""
    path = "/".join(["/v1/policies", quote(name, safe=":"), *below])
    return f"{path}?{urlencode(query)}" if query else path


def _print(answer: Any) -> None:
    typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))


def _cell(value: object) -> str:
    return "–" if value in (None, "", [], {}) else str(value)


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = [key for key in rows[0] if key not in ("name", "match", "object")]
    table = Table()
    for column in ("name", *shown):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], *(_cell(row.get(column)) for column in shown))
    return table
