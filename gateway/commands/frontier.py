"""The size, quality and speed frontier as a picture: one panel against size, one against speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.variants.card import Card

Row = tuple[str, str, Card]
_MARKERS = "osD^vP*Xph<>"
_LEAST_KL = 1e-5  # nats; where dense itself is drawn on the logarithmic axis
# Where a label may stand around its point, in points of distance; the first that is free is taken.
_PLACES = [
    (radius * x, radius * y)
    for radius in (7, 14, 24, 36, 50)
    for x, y in ((1, 0.6), (1, -0.9), (-1, 0.6), (-1, -0.9), (0, 1.2), (0, -1.6))
]


def pareto(rows: Sequence[Row]) -> list[str]:
    """Levels that no other level beats in both bytes and quality, smallest first."""
    return _unbeaten(rows, lambda card: card.stored_bytes)


def fastest(rows: Sequence[Row]) -> list[str]:
    """Levels that no other level beats in both decode speed and quality, fastest first."""
    timed = [row for row in rows if row[2].decode_tokens_per_s]
    return _unbeaten(timed, lambda card: -card.speedup)


def _unbeaten(rows: Sequence[Row], cost: Callable[[Card], float]) -> list[str]:
    best: list[str] = []
    lowest = float("inf")
    for level, _, card in sorted(rows, key=lambda r: (cost(r[2]), r[2].loss)):
        if card.loss < lowest:
            lowest = card.loss
            best.append(level)
    return best


def draw_frontier(model: str, rows: Sequence[Row], file: Path) -> None:
    """Write a PNG. Colour and marker name the family; the line joins, and names stand at, the
    levels that no other beats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    size, speed = figure.subplots(1, 2, sharey=True)
    _panel(size, rows, lambda card: card.stored_bytes / 1e6, pareto(rows))
    size.set_xscale("log")
    for axis in (size.xaxis.set_major_formatter, size.xaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    size.set_xlabel("stored MB")
    size.set_ylabel("KL from dense (nats per token, lower is better)")
    size.legend(fontsize=8, loc="upper right")
    timed = [row for row in rows if row[2].decode_tokens_per_s]
    _panel(speed, timed, lambda card: card.speedup, fastest(timed))
    speed.set_xlabel("decode speed-up at batch 1 (dense = 1)")
    for axes in (size, speed):
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
    figure.suptitle(f"{model}: size, quality and speed of every level", fontsize=11)
    figure.savefig(file, format="png")


def _panel(
    axes: Any, rows: Sequence[Row], across: Callable[[Card], float], named: list[str]
) -> None:
    families = list(dict.fromkeys(family for _, family, _ in rows))
    for index, family in enumerate(families):
        points = [(across(card), _height(card)) for _, own, card in rows if own == family]
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=38,
            marker=_MARKERS[index % len(_MARKERS)],
            label=family,
            alpha=0.8,
        )
    axes.set_yscale("log")
    by_name = {level: (across(card), _height(card)) for level, _, card in rows}
    line = [by_name[level] for level in named]
    axes.plot([x for x, _ in line], [y for _, y in line], linewidth=1, color="0.5", zorder=0)
    _place_labels(axes, {level: by_name[level] for level in named}, list(by_name.values()))


def _height(card: Card) -> float:
    return max(card.kl_nats, _LEAST_KL)


def _place_labels(
    axes: Any, labels: dict[str, tuple[float, float]], points: list[tuple[float, float]]
) -> None:
    """Put every label where it covers no other label and as few points as can be."""
    figure = axes.figure
    figure.canvas.draw()  # fixes the scales, so that places in pixels are final
    dots = axes.transData.transform(points) if points else []
    taken: list[Any] = []
    for name, point in labels.items():
        best: tuple[int, Any, Any] | None = None
        for dx, dy in _PLACES:
            text = axes.annotate(
                name,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=7.5,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6"},
            )
            box = text.get_window_extent().padded(1)
            clash = 100 * sum(box.overlaps(other) for other in taken)
            clash += sum(box.contains(x, y) for x, y in dots)
            clash += 50 * (not axes.bbox.padded(-1).fully_containsx(box.x0))
            clash += 50 * (not axes.bbox.padded(-1).fully_containsx(box.x1))
            if best is None or clash < best[0]:
                if best is not None:
                    best[1].remove()
                best = (clash, text, box)
            else:
                text.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[2])
