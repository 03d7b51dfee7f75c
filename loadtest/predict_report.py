"""What the `predict` command makes of answers: errors of predictions and kept bounds. Pure, but for
printing what it found."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from loadtest.client import Outcome

PHASES: Final = ("warm-up", "steady", "burst", "after")
QUANTITIES: Final = ("ttft", "tpot", "latency")
ALL: Final = "all"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: what was predicted and measured for it (ms), by quantity; `high`: the bound that
    a share `confidence` of answers was to keep."""

    phase: str
    level: str
    predicted: dict[str, float]
    high: dict[str, float]
    measured: dict[str, float]
    confidence: float | None


def answers(outcomes: Iterable[Outcome], ends: Sequence[float]) -> list[Answer]:
    """Those that ended well and say what was predicted; `ends`: when each phase ends (s after the
    start)."""
    found = []
    for outcome in outcomes:
        told = outcome.compression
        if outcome.status != "ok" or not told or not told.get("predicted"):
            continue
        predicted, measured = told["predicted"], told["measured"]
        at = outcome.planned.at or 0.0
        found.append(
            Answer(
                phase=PHASES[min(len(PHASES) - 1, bisect_right(ends, at))],
                level=told["level"],
                predicted=_times(predicted, "{}_ms"),
                high=_times(predicted, "{}_high_ms"),
                measured=_times(measured, "{}_ms"),
                confidence=predicted.get("confidence"),
            )
        )
    return found


def _times(numbers: dict[str, Any], name: str) -> dict[str, float]:
    pairs = ((quantity, numbers.get(name.format(quantity))) for quantity in QUANTITIES)
    return {quantity: value for quantity, value in pairs if value is not None and value > 0}


def summarize(found: Sequence[Answer]) -> dict[str, Any]:
    """By phase, level (and `ALL` of either) and quantity: answers, MAPE, bias (mean of predicted ÷
    measured − 1), share of answers that kept the upper bound."""
    confidences = sorted({answer.confidence for answer in found if answer.confidence is not None})
    phases: dict[str, Any] = {}
    for phase in PHASES:
        part = [answer for answer in found if answer.phase == phase]
        levels = sorted({answer.level for answer in part})
        phases[phase] = {
            level: _errors([a for a in part if level in (ALL, a.level)]) for level in (ALL, *levels)
        }
    later = [answer for answer in found if answer.phase != PHASES[0]]
    return {
        "confidence": confidences,
        "answers": len(found),
        "phases": phases,
        "all_but_warm_up": _errors(later),
    }


def _errors(found: Sequence[Answer]) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for quantity in QUANTITIES:
        known = [a for a in found if quantity in a.predicted and quantity in a.measured]
        bounded = [a for a in known if quantity in a.high]
        said = np.array([a.predicted[quantity] for a in known])
        true = np.array([a.measured[quantity] for a in known])
        kept = [a.measured[quantity] <= a.high[quantity] for a in bounded]
        errors[quantity] = {
            "answers": len(known),
            "mape": float(np.mean(np.abs(said / true - 1.0))) if known else None,
            "bias": float(np.mean(said / true - 1.0)) if known else None,
            "median_ms": float(np.median(true)) if known else None,
            "kept": float(np.mean(kept)) if bounded else None,
            "high_over_predicted": float(
                np.mean([a.high[quantity] / a.predicted[quantity] for a in bounded])
            )
            if bounded
            else None,
        }
    return errors


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report."""
    promised = ", ".join(f"{100 * share:g} %" for share in report["confidence"]) or "none"
    console.print(f"{report['answers']} answers; promised upper quantile: {promised}")
    table = Table("phase", "level", "answers", title="Mean absolute error of predictions, %")
    for quantity in QUANTITIES:
        for column in (f"{quantity} ms", "MAPE", "bias", "kept"):
            table.add_column(column, justify="right")
    rows = [
        (phase, level, errors)
        for phase, levels in report["phases"].items()
        for level, errors in levels.items()
    ]
    rows.append(("all but warm-up", ALL, report["all_but_warm_up"]))
    for phase, level, errors in rows:
        cells = [phase, level, str(errors["ttft"]["answers"])]
        for quantity in QUANTITIES:
            told = errors[quantity]
            cells.append("" if told["median_ms"] is None else f"{told['median_ms']:.1f}")
            cells += [_percent(told[name]) for name in ("mape", "bias", "kept")]
        table.add_row(*cells)
    console.print(table)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
