"""A real Prometheus for tests, from PATH, run on the project's own configuration and alert rules.

It scrapes every second what the test names, keeps its data in a folder of its own, listens on a
free loopback port and dies with the tests.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus"
_PDEATHSIG = 1

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: apt install prometheus"
)
prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus: apt install prometheus"
)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


class PrometheusServer:
    """`with PrometheusServer("127.0.0.1:8000") as server:` scrapes that as job pressgate."""

    def __init__(self, *targets: str) -> None:
        self._targets = targets
        self._folder = Path(tempfile.mkdtemp(prefix="prometheus-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> PrometheusServer:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={self._write_config()}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads in the tests' parent
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(timeout=20)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_config(self) -> Path:
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": list(self._targets)}]
        for name in config["rule_files"]:
            shutil.copy(CONFIG / name, self._folder)
        path = self._folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of one API call."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - loopback
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # it listens before it is ready
                raise ConnectionError("Prometheus is starting") from None
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector that an expression gives now."""
        data = self.get("query", query=expr)
        assert data["resultType"] == "vector", data["resultType"]
        result: list[dict[str, Any]] = data["result"]
        return result

    def value(self, expr: str) -> float:
        """The one value that an expression gives now."""
        (sample,) = self.query(expr)
        return float(sample["value"][1])

    def wait_up(self, timeout: float = 60.0) -> None:
        """Wait until every target was scraped twice: rates need two samples."""
        wanted = 'count(count_over_time((up{job="pressgate"} == 1)[1m:1s]) >= 2)'
        self.wait_for(f"{wanted} == {len(self._targets)}", timeout)

    def wait_for(self, expr: str, timeout: float = 60.0) -> None:
        """Wait until an expression gives anything. Raises: AssertionError with the server's log."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if self.query(expr):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self._process is not None
                if self._process.poll() is not None:
                    break
            time.sleep(0.2)
        log = (self._folder / "log").read_text(errors="replace")[-2000:]
        raise AssertionError(f"not within {timeout:g} s: {expr}\n{log}")
