"""`pressgate explain`: what a running gateway would do with a request, or did with one, level by
level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from cache.stamps import stamped_at
from gateway.api.ledger import PREFIX
from gateway.commands.http import call, gateway_answers
from gateway.commands.options import DEFAULT_URL, AsJson, Key, Url
from gateway.commands.tables import wide_console
from gateway.errors import InvalidRequest

_Ms = Annotated[float | None, typer.Option(help="Milliseconds.")]


def explain(
    prompt: Annotated[
        str, typer.Argument(help="The prompt, or the id of a decision (dec-…) taken before.")
    ],
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
    """Show which level a request would get (or got), why every other would not serve it better, and
    which budget would have got it."""
    if stamped_at(PREFIX, prompt) is not None:
        _show(call("GET", url, f"/v1/decisions/{prompt}", api_key), url, as_json=as_json)
        return
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
    _show(call("POST", url, "/v1/explain", api_key, body), url, as_json=as_json)


def _show(answer: Any, url: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))
        return
    with gateway_answers(url):
        table = _table(answer) if answer["levels"] is not None else None
        lines = [answer["decision"]["reason"], *_became(answer), *_otherwise(answer)]
    if table is not None:
        wide_console().print(table)
    for line in lines:
        wide_console().print(line, highlight=False, markup=False)


def _became(answer: dict[str, Any]) -> Iterator[str]:
    """What was measured, and which promises were kept."""
    result = answer.get("result")
    if result is None:
        return
    measured = result["measured"]
    if measured["ttft_ms"] is not None:
        pace = "" if measured["tpot_ms"] is None else f", then {measured['tpot_ms']:.3g} ms a token"
        yield (
            f"Measured: first token {measured['ttft_ms']:.4g} ms{pace}; "
            f"{result['generated_tokens']} tokens in {measured['latency_ms']:.4g} ms."
        )
    if result["code"] != 200:
        yield f"It ended with status {result['code']}."
    for name, promise in (result["promises"] or {}).items():
        word = "kept" if promise["kept"] else "broken"
        value = "unknown" if promise["measured"] is None else f"{promise['measured']:.6g}"
        yield f"{name} {promise['bound']:.6g}: {word} ({value})."


def _otherwise(answer: dict[str, Any]) -> Iterator[str]:
    """What another budget would have got."""
    found = answer["counterfactuals"]
    if found is None:
        return
    if found["unpinned"] is not None:
        yield found["unpinned"]["sentence"]
    for one in found["levels"]:
        yield from one["sentences"]
    for one in found["tighter"]:
        yield one["sentence"]


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
