"""Tables for people, out of a report's JSON. Nothing is computed here that the JSON does not
hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


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
    console.print(_groups("class", report["classes"], report["levels_by_class"]))
    if set(report["levels"]) != {"unknown"}:
        console.print(_groups("level", report["levels"], None))
    if report["prediction_error"]:
        console.print(_predictions(report["prediction_error"]))
    for text, count in report["errors"].items():
        console.print(f"[red]{count} ×[/] {escape(text)}", highlight=False)


def _latencies(total: Mapping[str, Any], lag: Mapping[str, float] | None) -> Table:
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "max", title="Latency")
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
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _groups(
    title: str, groups: Mapping[str, Any], levels: Mapping[str, Mapping[str, int]] | None
) -> Table:
    table = Table(title, "requests", "refused", "errors", "kept", "missed", "goodput/s", "tokens/s")
    for name in ("TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "p99"):
        table.add_column(name)
    for column in table.columns[1:]:
        column.justify = "right"
    if levels is not None:
        table.add_column("levels")
    for name, part in groups.items():
        cells = [
            name,
            str(part["requests"]),
            str(part["refused"]),
            str(part["errors"] + part["timeouts"]),
            _percent(part["attainment"]),
            ", ".join(f"{k.removesuffix('_ms')} {n}" for k, n in part["missed"].items()) or "–",
            f"{part['goodput_per_s']:.2f}",
            f"{part['output_tokens_per_s']:.1f}",
        ]
        for measure in ("ttft_ms", "tpot_ms", "latency_ms"):
            cells += [f"{part[measure][p]:.1f}" if part[measure] else "–" for p in ("p50", "p99")]
        if levels is not None:
            cells.append(", ".join(f"{k} {n}" for k, n in levels[name].items()) or "–")
        table.add_row(*cells)
    return table


def _predictions(errors: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("prediction", "requests", "MAPE", "median", "predicted / measured")
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
