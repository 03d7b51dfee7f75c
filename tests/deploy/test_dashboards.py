"""Dashboards and alerts as files: up to date, well formed, about metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import generate
from gateway.metrics import Metrics
from gateway.variants.card import Card
from gateway.variants.jobs import Job
from gateway.variants.variant import LadderSnapshot, LevelFacts, State
from tests.support.panels import Panel, panels
from tests.support.prometheus_server import promtool

PROMETHEUS = Path(generate.__file__).parents[1] / "prometheus"
BOARDS = sorted(generate.FOLDER.glob("*.json"))


def test_the_committed_dashboards_are_what_the_code_makes() -> None:
    made = generate.files()
    assert sorted(made) == BOARDS
    for path, text in made.items():
        assert path.read_text() == text, f"{path.name}: run python -m deploy.grafana.generate"


def _board(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text())
    return board


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_fit_the_grid_and_do_not_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in _board(path)["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_say_what_they_show(path: Path) -> None:
    board = _board(path)
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        assert panel["title"]
        assert panel["targets"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert panel["datasource"]["uid"] == "${datasource}"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board))) - {"__rate_interval", "__all"}
    assert used <= variables


def test_dashboards_have_their_own_addresses() -> None:
    boards = [_board(path) for path in BOARDS]
    assert len({board["uid"] for board in boards}) == len(boards)
    assert len({board["title"] for board in boards}) == len(boards)


class _OneOfEach:
    """A ladder with every fact set, so that every gauge is exported."""

    memory_budget = 1
    memory_evictions = 1

    def memory_used(self) -> int:
        return 1

    def models(self) -> list[str]:
        return ["m"]

    def jobs(self) -> list[Job]:
        return []

    def snapshot(self, model: str) -> LadderSnapshot:
        from gateway.engine.base import EngineStats

        card = Card(stored_bytes=1, resident_bytes=1)
        stats = EngineStats(kv_total_blocks=1)
        facts = LevelFacts("bf16", "dense", State.READY, card, stats)
        return LadderSnapshot(model=model, levels=(facts,), memory_budget=1, memory_used=1)


def _exported() -> dict[str, set[str]]:
    """Every name that /metrics can have, with the labels it can carry."""
    metrics = Metrics()
    metrics.watch(_OneOfEach())
    names: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        endings = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(family.type, ("",))
        for ending in endings:
            labels = {label for sample in family.samples for label in sample.labels}
            names[family.name + ending] = labels
    # Labels of families without samples yet are declared, not seen.
    for collector in metrics.registry._collector_to_names:
        declared = set(getattr(collector, "_labelnames", ()))
        for name in metrics.registry._collector_to_names[collector]:
            if name in names:
                names[name] |= declared | ({"le"} if name.endswith("_bucket") else set())
    return names


def _alerts() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        yield from group["rules"]


def _all_queries() -> list[Any]:
    queries = [
        pytest.param(panel.expr, id=f"{panel.board}: {panel.title} {panel.ref}")
        for panel in panels()
    ]
    return queries + [pytest.param(a["expr"], id=a["alert"]) for a in _alerts()]


@pytest.mark.parametrize("expr", _all_queries())
def test_queries_ask_for_metrics_and_labels_that_exist(expr: str) -> None:
    exported = _exported()
    found = re.findall(r"(pressgate_\w+)(?:\{([^}]*)\})?", expr)
    for name, selector in found:
        assert name in exported, name
        for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector):
            assert label in exported[name], f"{name} has no label {label}"
    assert found or "up{" in expr


def test_every_metric_is_on_some_dashboard() -> None:
    asked = " ".join(panel.expr for panel in panels())
    families = {
        re.sub(r"_(bucket|sum|count|total)$", "", name)
        for name in _exported()
        if not name.endswith("_created")
    }
    unseen = {family for family in families if family not in asked}
    assert not unseen


@promtool
def test_panel_queries_parse(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{index}", "expr": panel.expr} for index, panel in enumerate(panels())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    _promtool("check", "rules", str(path))


@promtool
def test_prometheus_takes_its_configuration_and_rules() -> None:
    _promtool("check", "config", "prometheus.yml")
    _promtool("check", "rules", "alerts.yml")


@promtool
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    _promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_seen_to_fire_in_a_test() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {alert["alert"] for alert in _alerts()}


def _promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_are_found_with_their_variables_filled_in() -> None:
    found = panels()
    assert len(found) > 40
    assert all(isinstance(panel, Panel) and "$" not in panel.expr for panel in found)
