"""`pressgate explain`: what a running gateway would do with a request, level by level."""

from __future__ import annotations

import math
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from gateway.commands.http import call, gateway_answers
from gateway.commands.options import DEFAULT_URL, AsJson, Key, Url
from gateway.commands.tables import wide_console
from gateway.errors import InvalidRequest

_Ms = Annotated[float | None, typer.Option(help="Milliseconds.")]


def explain(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    model: Annotated[str | None, typer.Option(help="MODEL or MODEL@LEVEL.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    policy: Annotated[str | None, typer.Option(help="Name of a policy.")] = None,
    ttft_ms: _Ms = None,
    tpot_ms: _Ms = None,
    latency_ms: _Ms = None,
    memory_mb: Annotated[float | None, typer.Option(help="Megabytes.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="1.05: 5 % worse.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="0 to 1.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="quality, latency, memory or throughput.")
    ] = None,
    on_miss: Annotated[str | None, typer.Option(help="wait, nearest or reject.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which level a request would get and why every other would not serve it better."""
    sla = {
        "policy": policy,
        "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms,
        "latency_ms": latency_ms,
        "memory_mb": memory_mb,
        "max_ppl_ratio": max_ppl_ratio,
        "min_agreement": min_agreement,
        "objective": objective,
        "on_miss": on_miss,
    }
    for name, value in sla.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"--{name.replace('_', '-')}: {value} is no bound", param=name)
    if model is None:
        answer = call("GET", url, "/v1/models", api_key)
        with gateway_answers(url):
            model = answer["data"][0]["id"]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "sla": {name: value for name, value in sla.items() if value is not None},
    }
    answer = call("POST", url, "/v1/explain", api_key, body)
    if as_json:
        typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))
        return
    with gateway_answers(url):
        table, reason = _table(answer), answer["decision"]["reason"]
    wide_console().print(table)
    wide_console().print(reason, highlight=False)


def _table(answer: dict[str, Any]) -> Table:
    table = Table(title=f"{answer['model']}, policy {answer['policy']}", title_justify="left")
    for name in (
        "level",
        "state",
        "TTFT ms",
        "TPOT ms",
        "latency ms",
        "MB",
        "ppl ratio",
        "verdict",
    ):
        table.add_column(name, justify="left" if name in ("level", "state", "verdict") else "right")
    for row in answer["levels"]:
        predicted = row["predicted"] or {}
        cells = [
            _figure(predicted.get(name))
            for name in ("ttft_ms", "tpot_ms", "latency_ms", "memory_mb")
        ]
        mark = "[green]✓[/green] " if row["ok"] else "[red]✗[/red] "
        ratio = f"{'~' if row['estimated'] else ''}{row['perplexity_ratio']:.3f}"
        table.add_row(row["level"], row["state"], *cells, ratio, mark + row["why"])
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
