"""A real gateway under real traffic, scraped by a real Prometheus: every panel has data, every
alert can be evaluated."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway_process import GatewayProcess
from tests.support.panels import Panel, panels
from tests.support.prometheus_server import PrometheusServer, prometheus
from tests.support.redis_server import RedisServer

pytestmark = [prometheus, pytest.mark.slow]

CONFIG = {
    "models": [{"id": "docs-17m", "path": "builtin"}],
    "levels": ["bf16", "int8", "int4-rtn-g64"],
    "memory_budget": "1GiB",
    "threads": 1,
    "shadow": {"rate": 1.0},
    "engine": {"max_num_seqs": 4},  # so that some wait for a slot when many come
    "policies": [
        {"name": "default"},
        {"name": "strict", "match": {"header": {"x-tier": "strict"}}, "max_ppl_ratio": 1.0001},
    ],
}
MIX = """\
classes:
  - {name: dense, model: docs-17m@bf16, max_tokens: 8}
  - {name: int8, model: docs-17m@int8, max_tokens: 8}
  - {name: open, max_tokens: 8}
  - {name: hopeless, sla: {ttft_ms: 0.01, on_miss: nearest}, max_tokens: 4}
  - {name: refused, weight: 0.5, sla: {memory_mb: 0.001, on_miss: reject}, max_tokens: 4}
"""


def _load(gateway: GatewayProcess, folder: Path, users: int = 2) -> dict[str, int]:
    """Some seconds of the mix through the load test, the same prompts each time."""
    (folder / "mix.yaml").write_text(MIX)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "run", "--url", gateway.url, "--users", str(users)),
            *("--requests", "60", "--duration", "60", "--mix", str(folder / "mix.yaml")),
            *("--prompt-tokens", "40", "--json", "-"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + gateway.log
    report = json.loads(done.stdout)
    assert report["total"]["errors"] == 0, report["errors"]
    assert report["classes"]["refused"]["refused"] == report["classes"]["refused"]["requests"]
    assert report["classes"]["hopeless"]["good"] == 0
    total: dict[str, int] = report["total"]
    return total


def _build(gateway: GatewayProcess, level: str, timeout: float = 240.0) -> None:
    job = gateway.post(f"/v1/levels/{level}:build", status=202)
    deadline = time.monotonic() + timeout
    while job["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, (job, gateway.log)
        time.sleep(0.2)
        job = gateway.get(f"/v1/jobs/{job['id']}")
    assert job["state"] == "done", (job, gateway.log)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus that has seen a gateway build, load, serve, refuse and miss budgets."""
    folder = tmp_path_factory.mktemp("load")
    with RedisServer() as redis:
        gateway = GatewayProcess(folder, CONFIG | {"cache": {"redis_url": redis.url}})
        with gateway, PrometheusServer(f"127.0.0.1:{gateway.port}") as server:
            server.wait_up()
            _build(gateway, "int8")
            candidate = {"policy": {"max_ppl_ratio": 1.5}, "percent": 50}
            gateway.post("/v1/policies/default:canary", candidate)
            # The first round brings the counters to life; rates need a second one to grow.
            first = _load(gateway, folder)
            server.wait_for('pressgate_slo_met_total{level="int8"}')
            crowd = _load(gateway, folder, users=24)
            second = _load(gateway, folder)
            answered = first["ok"] + crowd["ok"] + second["ok"]
            server.wait_for(f'sum(pressgate_requests_total{{code="200"}}) >= {answered}')
            yield server


# What only happens to keys with quotas, and to answers in danger, has no series until it does.
SELDOM = ("pressgate_quota_refusals_total", "pressgate_level_changes_total")
SHOWN = [panel for panel in panels() if not any(name in panel.expr for name in SELDOM)]


@pytest.mark.parametrize("panel", SHOWN, ids=lambda p: f"{p.board}: {p.title} {p.ref}")
def test_every_panel_has_data(scraped: PrometheusServer, panel: Panel) -> None:
    values = [float(sample["value"][1]) for sample in scraped.query(panel.expr)]
    assert values, f"no series for {panel.expr}"
    assert any(math.isfinite(value) for value in values), f"{values} for {panel.expr}"


def test_the_numbers_make_sense(scraped: PrometheusServer) -> None:
    by_title = {(p.board, p.title): p.expr for p in panels() if p.ref == "A"}
    attained = scraped.value(by_title["overview", "Kept their budgets"])
    refused = scraped.value(by_title["overview", "Refused"])
    assert 0 < refused < 1
    assert 0 < attained <= 1 - refused  # hopeless requests are served and miss
    assert scraped.value(by_title["overview", "Server errors"]) == 0
    assert scraped.value(by_title["cache-and-builds", "Redis"]) == 1
    assert scraped.value('pressgate_variant_state{level="int8", state="ready"}') == 1
    built = scraped.value('sum(pressgate_build_seconds_count{outcome="done", level="int8"})')
    assert built == 1


def test_every_alert_is_evaluated_and_none_fires_on_a_well_gateway(
    scraped: PrometheusServer,
) -> None:
    rules = [rule for group in scraped.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) >= 10
    assert {rule["health"] for rule in rules} == {"ok"}, [
        (rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"
    ]
    firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
    assert firing == set()
    for rule in rules:
        scraped.query(rule["query"])


def test_an_alert_fires_when_the_gateway_goes_away(scraped: PrometheusServer) -> None:
    # Nothing listens there: Prometheus itself sees the target down and the rule turns pending.
    with PrometheusServer("127.0.0.1:1") as lonely:
        lonely.wait_for('ALERTS{alertname="PressgateDown", alertstate="pending"}')
    assert not scraped.query('ALERTS{alertname="PressgateDown"}')
