"""A study's report: means with confidence intervals over seeds, ratios, tables, plots.

Seeds are paired: every system plays the same windows, so a ratio of two systems is taken per seed
and its interval is over seeds (Student's t, 95 %).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loadtest.compare.markdown import NOTHING, table

GOAL: Final = "quality_goodput_per_s"
MEASURES: Final = (
    GOAL,
    "goodput_per_s",
    "attainment",
    "attainment_of_admitted",
    "refused",
    "failed",
    "ppl_ratio",
    "memory_peak_mb",
)
Row = Mapping[str, Any]
Interval = dict[str, float | None]


def interval(values: Sequence[float]) -> Interval:
    """Mean and half the width of its 95 % confidence interval; None for a single value's."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half": None}
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half": float(stats.t.ppf(0.975, len(values) - 1)) * spread}


def gather(runs: Sequence[Row]) -> dict[str, Any]:
    """Numbers by system over seeds, and how many times others' Pressgate is worth.

    `best_fixed`: the fixed level whose mean is highest, chosen in hindsight over all seeds.
    """
    names = list(dict.fromkeys(str(run["system"]) for run in runs))
    by_system = {name: [run for run in runs if run["system"] == name] for name in names}
    systems = {
        name: {"kind": rows[0]["kind"], "callers": _callers(rows)}
        | {measure: _over_seeds(rows, measure) for measure in MEASURES}
        for name, rows in by_system.items()
    }
    fixed = [name for name in names if systems[name]["kind"] == "fixed"]
    best = max(fixed, key=lambda name: systems[name][GOAL]["mean"])
    ours = by_system["pressgate"]
    return {
        "systems": systems,
        "best_fixed": best,
        "ratios": {
            name: _ratio(ours, rows) for name, rows in by_system.items() if name != "pressgate"
        },
    }


def _over_seeds(rows: Sequence[Row], measure: str) -> Interval | None:
    values = [float(row[measure]) for row in rows if row[measure] is not None]
    return interval(values) if values else None


def _ratio(ours: Sequence[Row], theirs: Sequence[Row]) -> Interval | None:
    by_seed = {row["seed"]: float(row[GOAL]) for row in theirs}
    ratios = [float(row[GOAL]) / by_seed[row["seed"]] for row in ours if by_seed.get(row["seed"])]
    return interval(ratios) if ratios else None


def _callers(rows: Sequence[Row]) -> dict[str, Any]:
    names = list(rows[0]["callers"])
    return {
        name: _over_seeds([row["callers"][name] for row in rows], "attainment") for name in names
    }


def tables(report: Row) -> list[str]:
    """Two Markdown tables: what each system was worth, and each class's attainment."""
    systems: Mapping[str, Row] = report["systems"]
    head = [
        "system",
        "quality-weighted goodput /s",
        "pressgate ÷ it",
        "goodput /s",
        "attainment",
        "of admitted",
        "refused",
        "ppl ratio",
        "memory peak MB",
    ]
    rows = [
        [
            f"**{name}** (best fixed)" if name == report["best_fixed"] else name,
            _cell(row[GOAL], 2),
            _cell(report["ratios"].get(name), 2),
            _cell(row["goodput_per_s"], 2),
            _percent(row["attainment"]),
            _percent(row["attainment_of_admitted"]),
            _cell(row["refused"], 0),
            _cell(row["ppl_ratio"], 4),
            _cell(row["memory_peak_mb"], 0),
        ]
        for name, row in systems.items()
    ]
    callers = list(next(iter(systems.values()))["callers"])
    shares = [
        [name, *(_percent(row["callers"][caller]) for caller in callers)]
        for name, row in systems.items()
    ]
    return [table(head, rows), table(["attainment by class", *callers], shares)]


def plot(report: Row, file: Path) -> None:
    """Quality-weighted goodput by system, and attainment by class, as one PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    systems: Mapping[str, Row] = report["systems"]
    names = list(systems)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    means = [systems[name][GOAL]["mean"] for name in names]
    halves = [systems[name][GOAL]["half"] or 0.0 for name in names]
    colours = ["tab:green" if name == "pressgate" else "tab:gray" for name in names]
    left.barh(names, means, xerr=halves, color=colours, capsize=3)
    left.invert_yaxis()
    left.set_xlabel("quality-weighted goodput (kept requests/s × dense ÷ served perplexity)")
    callers = list(systems[names[0]]["callers"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        shares = [(systems[name]["callers"][c] or {"mean": 0.0})["mean"] for c in callers]
        at = [place + index * width for place in range(len(callers))]
        right.bar(at, shares, width, label=name)
    right.set_xticks([place + 0.4 - width / 2 for place in range(len(callers))], callers)
    right.set_ylabel("promises kept ÷ requests")
    right.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _cell(value: Row | None, digits: int) -> str:
    if value is None:
        return NOTHING
    mean, half = f"{value['mean']:,.{digits}f}", value["half"]
    return mean if half is None else f"{mean} ± {half:,.{digits}f}"


def _percent(value: Row | None) -> str:
    return NOTHING if value is None else f"{100 * value['mean']:.1f} %"
