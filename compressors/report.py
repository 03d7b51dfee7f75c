"""Showing a finished job: a rich table, or JSON (`Report.to_json`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from compressors.base import LayerReport, Report


def by_kind(report: Report) -> dict[str, list[LayerReport]]:
    """The layers by name inside their block, e.g. `mlp.up_proj`."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        parts = layer.module.split(".")
        last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        kinds.setdefault(".".join(parts[last_number + 1 :]), []).append(layer)
    return kinds


def to_table(report: Report) -> Table:
    """One row per kind of linear, over all blocks: scheme, bytes, worst error, seconds, notes."""
    from rich.table import Table

    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in report.seconds.items())
    table = Table(title=report.recipe, caption=seconds)
    for header in ("linear", "scheme"):
        table.add_column(header)
    for header in ("layers", "MB before", "MB after", "ratio", "mean error", "worst", "seconds"):
        table.add_column(header, justify="right")
    table.add_column("note")
    for kind, layers in by_kind(report).items():
        before = sum(layer.bytes_before for layer in layers)
        after = sum(layer.bytes_after for layer in layers)
        errors = [layer.relative_error for layer in layers]
        table.add_row(
            kind,
            ", ".join(sorted({layer.scheme for layer in layers})),
            str(len(layers)),
            f"{before / 1e6:.2f}",
            f"{after / 1e6:.2f}",
            f"{before / after:.2f}×",
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f}",
            f"{sum(layer.seconds for layer in layers):.1f}",
            "; ".join(sorted({layer.note for layer in layers} - {""})),
        )
    for module, why in report.skipped.items():
        table.add_row(module, "–", *[""] * 7, why)
    return table
