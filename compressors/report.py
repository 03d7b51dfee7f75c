"""Showing a finished job, from its JSON (`Report.to_json`), as rich tables. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Layer = Mapping[str, Any]
_BLOCK = re.compile(r"^.*?\.?\d+\.")
_SKIPPED_SHOWN = 12


def by_kind(report: Mapping[str, Any]) -> dict[str, list[Layer]]:
    """The layers by name inside their block, e.g. `mlp.up_proj`; experts together."""
    kinds: dict[str, list[Layer]] = {}
    for layer in report["layers"]:
        name = _BLOCK.sub("", layer["module"], count=1)
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(layer)
    return kinds


def to_table(report: Mapping[str, Any]) -> Table:
    """One row per kind of linear, over all blocks: scheme, bytes, worst error, seconds, notes."""
    from rich.table import Table

    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in report["seconds"].items())
    table = Table(title=report["recipe"], caption=seconds)
    for header in ("linear", "scheme"):
        table.add_column(header)
    for header in ("layers", "MB before", "MB after", "ratio", "mean error", "worst", "seconds"):
        table.add_column(header, justify="right")
    table.add_column("note")
    for kind, layers in by_kind(report).items():
        before = sum(layer["bytes_before"] for layer in layers)
        after = sum(layer["bytes_after"] for layer in layers)
        errors = [layer["relative_error"] for layer in layers]
        table.add_row(
            kind,
            ", ".join(sorted({layer["scheme"] for layer in layers})),
            str(len(layers)),
            f"{before / 1e6:.2f}",
            f"{after / 1e6:.2f}",
            f"{before / after:.2f}×",
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f}",
            f"{sum(layer['seconds'] for layer in layers):.1f}",
            "; ".join(sorted({layer["note"] for layer in layers} - {""})),
        )
    skipped = list(report["skipped"].items())
    for module, why in skipped[:_SKIPPED_SHOWN]:
        table.add_row(module, "–", *[""] * 7, why)
    if len(skipped) > _SKIPPED_SHOWN:
        table.add_row(f"and {len(skipped) - _SKIPPED_SHOWN} more", "–", *[""] * 8)
    return table


def parts_table(parts: Mapping[str, int]) -> Table:
    """Where the stored bytes are, largest part first."""
    from rich.table import Table

    table = Table(title="stored bytes by part")
    table.add_column("part")
    table.add_column("MB", justify="right")
    table.add_column("share", justify="right")
    total = sum(parts.values())
    for part, size in parts.items():
        table.add_row(part, f"{size / 1e6:.2f}", f"{size / total:.1%}")
    return table
