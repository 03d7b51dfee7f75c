"""Grafana's dashboards as queries: every panel's PromQL with the template variables filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
RATE_INTERVAL = "5m"  # longer than any test asks questions about what it did


@dataclass(frozen=True, slots=True)
class Panel:
    """One target of one panel."""

    board: str
    title: str
    ref: str
    expr: str


def panels(rate_interval: str = RATE_INTERVAL) -> list[Panel]:
    """Every target of every committed dashboard, as Grafana would ask it with "All" chosen."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expr = target["expr"].replace("$__rate_interval", rate_interval)
                for name in ("model", "level", "policy"):
                    expr = expr.replace(f"${name}", ".*")
                found.append(Panel(path.stem, panel["title"], target["refId"], expr))
    return found
