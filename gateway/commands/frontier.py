"""The performance-size frontier as a picture: bytes against quality, speed as the marker's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway.variants.card import Card


def pareto(rows: Sequence[tuple[str, str, Card]]) -> list[str]:
    """Levels that no other level beats in both bytes and quality, smallest first."""
    best: list[str] = []
    lowest = float("inf")
    for level, _, card in sorted(rows, key=lambda r: (r[2].stored_bytes, r[2].loss)):
        if card.loss < lowest:
            lowest = card.loss
            best.append(level)
    return best


def draw_frontier(model: str, rows: Sequence[tuple[str, str, Card]], file: Path) -> None:
    """Write a PNG. Colours name families; the line joins the Pareto-best levels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for family in dict.fromkeys(family for _, family, _ in rows):
        cards = [card for _, own, card in rows if own == family]
        axes.scatter(
            [card.stored_bytes / 1e6 for card in cards],
            [card.perplexity_ratio for card in cards],
            s=[40 + 60 * max(0.0, card.speedup) for card in cards],
            label=family,
            alpha=0.75,
        )
    for level, _, card in rows:
        axes.annotate(
            level,
            (card.stored_bytes / 1e6, card.perplexity_ratio),
            textcoords="offset points",
            xytext=(7, 4),
            fontsize=8,
        )
    by_name = {level: card for level, _, card in rows}
    line = [by_name[level] for level in pareto(rows)]
    axes.plot(
        [card.stored_bytes / 1e6 for card in line],
        [card.perplexity_ratio for card in line],
        linewidth=1,
        color="0.5",
        zorder=0,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("stored MB")
    axes.set_ylabel("perplexity ÷ dense perplexity")
    axes.set_title(f"{model}: size, quality and speed (marker area) of every level", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, format="png")
