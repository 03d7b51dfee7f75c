"""Everything that breaks in the middle: files, disks, workers, the gateway itself."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.commands import PATIENT, pressgate, wait_for_jobs
from tests.support.gateway_process import GatewayProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAKE = {"models": [{"id": "fake", "path": "fake"}], "device": "cpu"}


@pytest.fixture
def home(tmp_path: Path, built: Path) -> Path:
    """A gateway's folder whose cache has the stored and measured level int8."""
    shutil.copytree(built, tmp_path / "cache")
    return tmp_path


def gateway(home: Path, **changes: Any) -> GatewayProcess:
    return GatewayProcess(home, PATIENT | changes, ready_s=280)


def metric(process: GatewayProcess, name: str) -> float:
    text = httpx.get(f"{process.url}/metrics", timeout=60).text
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)
    return sum(map(float, found))


def manifest_of(home: Path, level: str) -> Path:
    files = (home / "cache" / "manifests").glob("*.json")
    return next(file for file in files if json.loads(file.read_text())["recipe"] == level)


def refusal(process: GatewayProcess, **fields: Any) -> str:
    """The words of an answer that says no and when to come back."""
    body = {"model": "docs-17m@int8", "prompt": "a", "max_tokens": 2, "sla": {"on_miss": "wait"}}
    answer = httpx.post(f"{process.url}/v1/completions", json=body | fields, timeout=280)
    assert answer.status_code in (429, 503), answer.text
    assert int(answer.headers["retry-after"]) >= 1
    return str(answer.json()["error"]["message"])


def build_job(process: GatewayProcess, level: str) -> dict[str, Any]:
    return process.post(f"/v1/levels/{level}:build", status=202)


def worker_of(process: GatewayProcess) -> psutil.Process:
    """The build worker, once it is past reading its order."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        running = [job for job in process.get("/v1/jobs")["data"] if job["state"] == "running"]
        children = [
            child
            for child in psutil.Process(process.pid).children()
            if "gateway.variants.worker" in child.cmdline()
        ]
        if children and running and running[0]["message"] != "starting":
            return children[0]
        time.sleep(0.05)
    raise AssertionError(f"no build worker:\n{process.log}")


def test_a_damaged_blob_is_never_served_but_built_again(home: Path) -> None:
    with gateway(home) as process:
        good = process.complete(model="docs-17m@int8")
        assert wait_for_jobs(process) == []  # it was built before
    manifest = json.loads(manifest_of(home, "int8").read_text())
    tensors, module = manifest["tensors"], next(iter(manifest["modules"].values()))
    own = [tensors[name] for name in module["tensors"].values()]  # int8's, not shared with bf16
    digest = max(own, key=lambda record: int(record["nbytes"]))["digest"]
    (blob,) = (home / "cache" / "blobs").rglob(digest)
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))
    with gateway(home) as process:
        again = process.complete(model="docs-17m@int8", sla={"on_miss": "wait"})
        assert again["compression"]["level"] == "int8"
        assert again["choices"][0]["text"] == good["choices"][0]["text"]
        assert metric(process, "pressgate_cache_corruptions_total") >= 1
        assert [job["state"] for job in wait_for_jobs(process)] == ["done"]
    assert any((home / "cache" / "quarantine").iterdir())
    done = pressgate("cache", "verify", "--cache-dir", str(home / "cache"))
    assert done.returncode == 0, done.stdout


def test_a_truncated_manifest_is_a_level_that_is_absent(home: Path) -> None:
    file = manifest_of(home, "int8")
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:200])
    with gateway(home) as process:
        assert process.level("int8")["state"] == "absent"
        answer = process.complete(sla={"on_miss": "nearest"})
        assert answer["compression"]["level"] == "bf16"
        assert process.complete(model="docs-17m@bf16")["choices"][0]["text"]


def test_a_full_disk_fails_the_build_and_nothing_else(home: Path) -> None:
    """The operator's bound; that of the file system is below."""
    with gateway(home, cache={"disk_budget": "2MB"}) as process:
        message = refusal(process, model="docs-17m@int4-rtn-g64")
        assert "no room" in message
        assert process.level("int4-rtn-g64")["state"] == "failed"
        assert process.complete(model="docs-17m@bf16")["choices"]


def test_builds_that_die_leave_a_gateway_that_builds(home: Path) -> None:
    with gateway(home) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
        message = refusal(process, model="docs-17m@int4-rtn-g64")
        assert "too large" in message
        assert process.complete(model="docs-17m@bf16")["choices"]
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)

        job = build_job(process, "int4-rtn-g64")
        worker_of(process).kill()
        ended = next(one for one in wait_for_jobs(process) if one["id"] == job["id"])
        assert ended["state"] == "failed"
        assert "-9" in ended["error"]
        body = {"model": "docs-17m@int4-rtn-g64", "prompt": "a", "max_tokens": 2}
        answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 503  # not built again at once by requests
        assert "worker died" in answer.json()["error"]["message"]
        assert process.complete(model="docs-17m@bf16")["choices"]

        job = build_job(process, "int4-rtn-g64")
        ended = next(one for one in wait_for_jobs(process) if one["id"] == job["id"])
        assert ended["state"] == "done", ended
        answer = process.complete(model="docs-17m@int4-rtn-g64")
        assert answer["compression"]["level"] == "int4-rtn-g64"


def test_a_gateway_killed_in_a_build_starts_clean(home: Path) -> None:
    with gateway(home) as process:
        build_job(process, "int4-rtn-g64")
        worker = worker_of(process)
        process.stop(kill=True)
        worker.wait(20)  # it dies with its parent
    done = pressgate("cache", "verify", "--json", "--cache-dir", str(home / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["corrupt"] == []
    with gateway(home) as process:
        states = {row["level"]: row["state"] for row in process.get("/v1/levels")["data"]}
        assert states["int8"] == "stored"
        answer = process.complete(model="docs-17m@int4-rtn-g64", sla={"on_miss": "wait"})
        assert answer["compression"]["level"] == "int4-rtn-g64"


@pytest.mark.parametrize(
    ("tokens", "complete"), [(60, True), (4000, False)], ids=["short", "longer-than-the-grace"]
)
def test_a_stream_is_ended_before_the_gateway_stops(
    tmp_path: Path, tokens: int, complete: bool
) -> None:
    fake = {"tpot_ms": 50.0}
    config = FAKE | {"models": [{"id": "fake", "path": "fake", "fake": fake}]}
    body = {"model": "fake", "prompt": "a", "max_tokens": tokens, "stream": True}
    lines: list[str] = []
    started = threading.Event()

    def read(url: str) -> None:
        try:
            with httpx.stream("POST", url, json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    if len(lines) > 4:
                        started.set()
        except httpx.RemoteProtocolError:
            lines.append("cut off")

    with GatewayProcess(tmp_path, config) as process:
        reader = threading.Thread(target=read, args=(f"{process.url}/v1/completions",))
        reader.start()
        assert started.wait(60)
        began = time.monotonic()
        status = process.stop()
        reader.join(30)
    assert not reader.is_alive()
    assert status == 0, process.log
    assert "Exception in ASGI" not in process.log  # nothing was torn down under a request
    assert time.monotonic() - began < 25
    told = [line for line in lines if line]
    if complete:
        assert told[-1] == "data: [DONE]"
        assert "cut off" not in told
    else:  # the caller is told before the line goes dead
        assert "cut off" not in told
        assert any('"error"' in line for line in told[-2:]), told[-3:]


def test_an_interrupt_from_the_keyboard_is_a_good_end(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, FAKE) as process:
        os.kill(process.pid, signal.SIGINT)
        until = time.monotonic() + 30
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert process.stop() == 0
    assert "Traceback" not in process.log
