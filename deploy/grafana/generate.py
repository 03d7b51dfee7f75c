"""The Grafana dashboards as code: `python -m deploy.grafana.generate` writes `dashboards/*.json`.

Each panel asks one question of the gateway's metrics. The JSON is committed, because that is what
Grafana reads; a test fails when it is not what this code makes.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.boards import cache, levels, overview, slo

FOLDER = Path(__file__).parent / "dashboards"


def files() -> dict[Path, str]:
    """Every dashboard file and its content."""
    made = {
        "overview": overview.board(),
        "levels": levels.board(),
        "slo": slo.board(),
        "cache-and-builds": cache.board(),
    }
    return {
        FOLDER / f"{name}.json": json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, board in made.items()
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
