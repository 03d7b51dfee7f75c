"""Measuring in turn: A B C A B C …, medians, and ratios of neighbours.

A machine that others use drifts by more than engines differ. What is measured in the same round
drifts together, so a ratio is the median over rounds of ratios within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Measure = Callable[[], float]


def in_turn(
    measures: Mapping[str, Measure], runs: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """`runs` numbers of each, after one of each that is thrown away, unless they are `warm`. Every
    other round goes backwards, so that nobody always follows the same neighbour."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for measure in () if warm else measures.values():
        measure()
    for index in range(runs):
        order = list(measures)[:: 1 if index % 2 == 0 else -1]
        for name in order:
            found[name].append(measures[name]())
    return found


def versus(
    runs: Mapping[str, Sequence[float]], ours: str, *, more_is_better: bool = True
) -> dict[str, Any]:
    """Medians of everyone, the best of the others, and `ours` against it (above 1: ours is better).

    `ratio` is None when there is nobody to compare with. `ratios` holds everyone's.
    """
    medians = {name: statistics.median(values) for name, values in runs.items()}
    ratios = {}
    for name, values in runs.items():
        if name != ours:
            pairs = zip(runs[ours], values, strict=True)
            ratios[name] = statistics.median(
                mine / theirs if more_is_better else theirs / mine for mine, theirs in pairs
            )
    best = min(ratios, key=lambda name: ratios[name], default=None)
    return {
        "runs": {name: list(values) for name, values in runs.items()},
        "median": medians,
        "ratios": ratios,
        "best": best,
        "ratio": None if best is None else ratios[best],
    }
