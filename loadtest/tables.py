"""Tables for people, out of a report's JSON. Nothing is computed here that the JSON does not
hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.report import NO_LEVEL


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a run's report: totals, latencies, classes, levels, prediction error, errors."""
    total = report["total"]
    console.print(
        f"[bold]{total['requests']}[/] requests in {report['elapsed_seconds']:.1f} s: "
        f"{total['ok']} ended, {total['refused']} refused, {total['errors']} errors, "
        f"{total['timeouts']} timeouts"
    )
    console.print(
        f"throughput {total['requests_per_s']:.2f} requests/s, "
        f"{total['output_tokens_per_s']:.1f} tokens/s; "
        f"[bold]goodput {total['goodput_per_s']:.2f} requests/s[/] "
        f"({_percent(total['attainment'])} kept all their budgets)"
    )
    console.print(_latencies(total, report["send_lag_ms"]))
    console.print(_outcomes("class", report["classes"], report["levels_by_class"]))
    console.print(_speeds("class", report["classes"]))
    if set(report["levels"]) != {NO_LEVEL}:
        console.print(_outcomes("level", report["levels"], None))
        console.print(_speeds("level", report["levels"]))
    if report["prediction_error"]:
        console.print(_predictions(report["prediction_error"]))
    for text, count in report["errors"].items():
        console.print(f"[red]{count} ×[/] {escape(text)}", highlight=False)


def _latencies(total: Mapping[str, Any], lag: Mapping[str, float] | None) -> Table:
    table = _table("ms", "mean", "p50", "p90", "p95", "p99", "max")
    rows = (
        ("TTFT", total["ttft_ms"]),
        ("TTFT from the actual send", total["ttft_from_sent_ms"]),
        ("TPOT (mean of a request)", total["tpot_ms"]),
        ("between chunks", total["itl_ms"]),
        ("end to end", total["latency_ms"]),
        ("client's own send lag", lag),
    )
    for name, spread in rows:
        if spread:
            table.add_row(name, *(f"{value:.1f}" for value in spread.values()))
    return table


def _outcomes(
    title: str, groups: Mapping[str, Any], levels: Mapping[str, Mapping[str, int]] | None
) -> Table:
    """What became of the requests of each group."""
    table = _table(title, "sent", "refused", "failed", "kept", "good/s", left=("missed",))
    if levels is not None:
        table.add_column("levels")
    for name, part in groups.items():
        cells = [
            name,
            str(part["requests"]),
            str(part["refused"]),
            str(part["errors"] + part["timeouts"]),
            _percent(part["attainment"]),
            f"{part['goodput_per_s']:.2f}",
            _counts({k.removesuffix("_ms"): n for k, n in part["missed"].items()}),
        ]
        if levels is not None:
            cells.append(_counts(levels[name]))
        table.add_row(*cells)
    return table


def _speeds(title: str, groups: Mapping[str, Any]) -> Table:
    """How fast each group was: medians and 99th percentiles in ms."""
    measures = ("ttft_ms", "tpot_ms", "latency_ms")
    heads = ("TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "p99", "tok/s")
    table = _table(title, *heads)
    for name, part in groups.items():
        cells = [
            f"{part[measure][p]:.{1 if measure == 'tpot_ms' else 0}f}" if part[measure] else "–"
            for measure in measures
            for p in ("p50", "p99")
        ]
        table.add_row(name, *cells, f"{part['output_tokens_per_s']:.1f}")
    return table


def _table(first: str, *right: str, left: tuple[str, ...] = ()) -> Table:
    """An airy table: names to the left, numbers to the right, then columns of words."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in left:
        table.add_column(name)
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "–"


def _predictions(errors: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("prediction", "requests", "MAPE", "median", "predicted / measured")
    for name, error in errors.items():
        table.add_row(
            name.removesuffix("_ms"),
            f"{error['count']:.0f}",
            _percent(error["mape"]),
            _percent(error["median_ape"]),
            f"{error['bias']:.2f}",
        )
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
