"""Tables of comparisons in Markdown, out of a report's JSON: nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns hold words, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"


def number(value: float | None, digits: int = 0) -> str:
    """A number for a cell."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    """A ratio for a cell."""
    return NOTHING if value is None else f"**{value:.2f}**"


def document(title: str, report: Mapping[str, Any], tables: Sequence[str]) -> str:
    """Title, command, machine, versions, tables, and who was skipped and why."""
    host = report["host"]
    versions = ", ".join(f"{name} {value}" for name, value in sorted(report["versions"].items()))
    lines = [
        f"### {title}\n",
        f"`{report['command']}`\n",
        f"{host['cpu']}, {host['cores']} cores, {report['started_at']}; {versions}.\n",
        *tables,
    ]
    if report.get("skipped"):
        lines += ["Skipped:", *(f"- {reason}" for reason in report["skipped"]), ""]
    return "\n".join(lines)
