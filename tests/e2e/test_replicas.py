"""Several gateways, each with a disk of its own, and one Redis between them."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.commands import PATIENT, wait_for_jobs
from tests.support.gateway_process import GatewayProcess
from tests.support.redis_server import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAKE = {"models": [{"id": "fake", "path": "fake"}], "device": "cpu"}


def replica(folder: Path, redis: RedisServer, **changes: Any) -> GatewayProcess:
    config = PATIENT | changes
    return GatewayProcess(
        folder, config | {"cache": {"redis_url": redis.url, "redis_timeout_seconds": 5}},
        ready_s=280,
    )  # fmt: skip


def until(holds: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def jobs_of(gateway: GatewayProcess, level: str) -> list[dict[str, Any]]:
    return [job for job in gateway.get("/v1/jobs")["data"] if job["level"] == level]


def manifests(folder: Path) -> dict[str, bytes]:
    files = (folder / "cache" / "manifests").glob("*.json")
    return {json.loads(file.read_text())["recipe"]: file.read_bytes() for file in files}


def redis_up(gateway: GatewayProcess) -> float:
    text = httpx.get(f"{gateway.url}/metrics", timeout=60).text
    return float(text.split("\npressgate_redis_up ")[1].split()[0])


def put_policy(gateway: GatewayProcess, name: str, **fields: Any) -> None:
    answer = httpx.put(f"{gateway.url}/v1/policies/{name}", json=fields, timeout=60)
    assert answer.is_success, answer.text


def policies(gateway: GatewayProcess) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in gateway.get("/v1/policies")["data"]}


def greedy(gateway: GatewayProcess, level: str) -> str:
    answer = gateway.complete(
        model=f"docs-17m@{level}", max_tokens=16, sla={"on_miss": "wait"}
    )  # fmt: skip
    assert answer["compression"]["level"] == level
    return str(answer["choices"][0]["text"])


def test_a_replica_serves_what_another_built(tmp_path: Path, redis_server: RedisServer) -> None:
    """Built once on A; B has an empty disk. Then B loses the file again and fetches it again."""
    with replica(tmp_path / "a", redis_server) as a:
        text = greedy(a, "int8")
        assert [job["state"] for job in jobs_of(a, "int8")] == ["done"]
        wait_for_jobs(a)
    with replica(tmp_path / "b", redis_server) as b:
        assert b.level("int8")["state"] == "stored"
        assert b.level("int8")["measured"] is True  # the card came along
        assert greedy(b, "int8") == text
        assert wait_for_jobs(b) == []
    assert manifests(tmp_path / "b") == manifests(tmp_path / "a")
    _truncate(tmp_path / "b" / "cache")
    with replica(tmp_path / "b", redis_server) as b:
        assert greedy(b, "int8") == text
        assert wait_for_jobs(b) == []
    assert manifests(tmp_path / "b") == manifests(tmp_path / "a")


def test_a_level_wanted_by_two_at_once_is_built_once(
    tmp_path: Path, redis_server: RedisServer, built: Path
) -> None:
    for name in "ab":
        shutil.copytree(built, tmp_path / name / "cache")
    # Another number of threads makes b another host: it has no card of its own.
    with (
        replica(tmp_path / "a", redis_server) as a,
        replica(tmp_path / "b", redis_server, threads=2) as b,
    ):
        texts: dict[str, str] = {}

        def ask(name: str, gateway: GatewayProcess) -> None:
            texts[name] = greedy(gateway, "int4-rtn-g64")

        askers = [threading.Thread(target=ask, args=pair) for pair in (("a", a), ("b", b))]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert texts.keys() == {"a", "b"}
        assert texts["a"] == texts["b"]
        for gateway in (a, b):
            assert all(job["state"] == "done" for job in wait_for_jobs(gateway))
    # Seconds of the build are in the manifest: two builds never write the same bytes.
    first, second = manifests(tmp_path / "a"), manifests(tmp_path / "b")
    assert first["int4-rtn-g64"] == second["int4-rtn-g64"]


def test_policies_reach_every_replica_and_outlive_them(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with (
        replica(tmp_path / "a", redis_server, **FAKE) as a,
        replica(tmp_path / "b", redis_server, **FAKE) as b,
    ):
        put_policy(a, "tiny", memory_mb=1, on_miss="reject")
        until(lambda: "tiny" in policies(b), "the policy on b")
        refused = b.complete(422, model="fake", sla={"policy": "tiny"})
        assert refused["error"]["code"] == "budget_unmet"
        put_policy(b, "tiny", memory_mb=1000, on_miss="nearest")
        until(lambda: policies(a)["tiny"]["memory_mb"] == 1000, "the change on a")
        answer = a.complete(model="fake", sla={"policy": "tiny"})
        assert answer["compression"]["policy"] == "tiny"
    for name in "ab":
        with replica(tmp_path / name, redis_server, **FAKE) as again:
            assert policies(again)["tiny"]["memory_mb"] == 1000


def test_redis_may_die_and_come_back(tmp_path: Path, redis_server: RedisServer) -> None:
    with (
        replica(tmp_path / "a", redis_server, **FAKE) as a,
        replica(tmp_path / "b", redis_server, **FAKE) as b,
    ):
        assert redis_up(a) == 1
        redis_server.kill()
        for _ in range(3):
            assert a.complete(model="fake")["choices"]
        put_policy(a, "meanwhile", max_ppl_ratio=1.5)  # kept on a's disk
        until(lambda: redis_up(a) == 0, "the metric to say that Redis is down")
        assert a.complete(model="fake", sla={"policy": "meanwhile"})["choices"]
        redis_server.start()
        for gateway in (a, b):
            until(lambda g=gateway: redis_up(g) == 1, "the metric to say that Redis is back")
        put_policy(a, "after", max_ppl_ratio=1.5)
        until(lambda: "after" in policies(b), "a policy through the new Redis")
        until(lambda: "meanwhile" in policies(b), "the policy made while Redis was away")
        put_policy(b, "back", max_ppl_ratio=1.5)
        until(lambda: "back" in policies(a), "a policy the other way")


def _truncate(cache: Path) -> None:
    for file in (cache / "manifests").glob("*.json"):
        file.chmod(0o600)
        file.write_bytes(file.read_bytes()[:100])
