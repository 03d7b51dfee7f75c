"""Policies of a real gateway: versions, a dry run on its own log, and a candidate that is dropped
although the gateway was killed while it was tried."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.commands import facts
from tests.support.gateway_process import GatewayProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STABLE = {"match": {"path": "/v1/completions"}, "max_ppl_ratio": 1.5}
WORSE = STABLE | {"latency_ms": 0.001}
CHAT = "/v1/policies/chat"


def until(holds: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def put(gateway: GatewayProcess, document: dict[str, Any]) -> None:
    answer = httpx.put(gateway.url + CHAT, json=document, timeout=60)
    assert answer.is_success, answer.text


def ask(gateway: GatewayProcess, users: range) -> None:
    for number in users:
        answer = gateway.complete(model="fake", user=f"user-{number}")
        assert answer["compression"]["policy"] == "chat"


def test_versions_dry_run_and_a_candidate_that_falls(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    config = {
        "models": [{"id": "fake", "path": "fake"}],
        "device": "cpu",
        "decisions": {"log": str(log)},
    }
    with GatewayProcess(tmp_path, config) as gateway:
        put(gateway, STABLE)
        put(gateway, STABLE | {"max_ppl_ratio": 1.2})
        (change,) = gateway.get(CHAT + "/diff")["changes"]
        assert change == {"field": "max_ppl_ratio", "from": 1.5, "to": 1.2}
        gateway.post(CHAT + ":rollback", {"version": 1, "comment": "too strict"})
        ask(gateway, range(40))
        lines = until(lambda: log.exists() and log.read_text().splitlines(), "the log")
        assert json.loads(lines[0])["policy"] == "chat"
        gateway.post(CHAT + ":canary", {"policy": WORSE, "percent": 40})
        ask(gateway, range(40))
        arms = until(lambda: _counted(gateway, 40), "both arms to be counted and shared")
        assert arms["stable"]["attainment"] == 1.0
        assert arms["canary"]["attainment"] == 0.0
        assert arms["state"] == "collecting"
        gateway.stop(kill=True)
    with GatewayProcess(tmp_path, config) as gateway:
        assert gateway.get(CHAT + "/canary")["percent"] == 40

        def dropped() -> bool:
            ask(gateway, range(40, 80))
            return httpx.get(f"{gateway.url}{CHAT}/canary", timeout=60).status_code == 404

        until(dropped, "the candidate to be dropped")
        rows = facts("policy", "history", "chat", "--json", "--url", gateway.url)["data"]
        assert [(row["version"], row["kind"], row["of"]) for row in rows] == [
            (5, "fallback", 4),
            (4, "canary", None),
            (3, "rollback", 1),
            (2, "put", None),
            (1, "put", None),
        ]
        assert (rows[0]["author"], rows[2]["comment"]) == ("pressgate", "too strict")
        assert gateway.get(CHAT)["latency_ms"] is None
        metrics = httpx.get(f"{gateway.url}/metrics", timeout=60).text
        assert 'pressgate_policy_changes_total{kind="fallback",policy="chat"} 1.0' in metrics
    file = tmp_path / "worse.yaml"
    file.write_text(yaml.safe_dump({"name": "chat"} | WORSE))
    dry = facts(
        *("replay", str(log), "--policy", str(file), "--json"),
        *("--cache-dir", str(tmp_path / "cache")),
    )
    (comparison,) = dry["comparisons"]
    assert comparison["total"]["old"]["attainment"] == 1.0
    assert comparison["total"]["new"]["attainment"] == 0.0
    assert {row["policy"] for row in comparison["policies"]} == {"chat"}


def _counted(gateway: GatewayProcess, requests: int) -> Any:
    status = gateway.get(CHAT + "/canary")
    got = status["stable"]["requests"] + status["canary"]["requests"]
    shared = gateway.cache / "documents" / "policy-canaries" / "chat.json"
    if got < requests or not shared.exists():
        return None
    stored = json.loads(shared.read_text())["doc"]
    return status if stored["stable"][0] + stored["canary"][0] == requests else None
