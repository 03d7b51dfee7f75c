"""The gateway as users run it: `pressgate serve`, a process of its own, a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import yaml

_TEXT_CHARACTERS = 16_000  # about eight windows of 512 tokens


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_texts(folder: Path) -> dict[str, str]:
    """Small calibration and evaluation files; the configuration keys that name them."""
    files = {}
    for key, part in (("calibration", 0), ("eval_text", 1)):
        text = "\n\n".join(topics[name] for name in sorted(topics)[part::2])
        file = folder / f"{key}.txt"
        file.write_text(text[:_TEXT_CHARACTERS])
        files[key] = str(file)
    return files


class GatewayProcess:
    """Context manager around the command a user would type; `log` holds everything it printed."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        *,
        flags: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        ready_s: float = 120.0,
        short_texts: bool = True,
    ) -> None:
        """
        Args:
            short_texts: calibrate and judge on a few windows of Python's help topics, so that
                builds take seconds; otherwise on the default text, which the model must generate.
            folder: for the cache, the configuration and the log; may be shared by restarts.
            config: what goes into `pressgate.yaml`; the cache folder is added.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.cache = folder / "cache"
        self._ready_s = ready_s
        folder.mkdir(parents=True, exist_ok=True)
        # Two cores serve several test processes: OpenMP teams would only wait for each other.
        document = {"threads": 1, **(config or {})}
        document["cache"] = {"dir": str(self.cache), **document.get("cache", {})}
        if short_texts:
            document["build"] = {**write_texts(folder), **document.get("build", {})}
        file = folder / f"pressgate-{self.port}.yaml"
        file.write_text(yaml.safe_dump(document))
        self.log_file = folder / f"gateway-{self.port}.log"
        command = ("-m", "gateway.cli", "serve", "--config", str(file), "--port", str(self.port))
        self._command = [sys.executable, *command, *flags]
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> GatewayProcess:
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._env
            )
        until = time.monotonic() + self._ready_s
        while not self._answers("/readyz"):
            assert self._process.poll() is None, f"the gateway ended:\n{self.log}"
            assert time.monotonic() < until, f"not ready in {self._ready_s} s:\n{self.log}"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, *, kill: bool = False) -> int:
        """End the process (SIGTERM, or SIGKILL) and return its exit status. Idempotent."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the gateway did not stop:\n{self.log}") from None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str) -> Any:
        response = httpx.get(self.url + path, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, body: Any = None, *, status: int = 200, timeout: float = 240) -> Any:
        response = httpx.post(self.url + path, json=body, timeout=timeout)
        assert response.status_code == status, f"{response.status_code}: {response.text}"
        return response.json()

    def complete(self, status: int = 200, **fields: Any) -> Any:
        """One greedy completion of the bundled model unless `fields` say otherwise."""
        body = {
            "model": "docs-17m",
            "prompt": "The function returns",
            "max_tokens": 8,
            "temperature": 0,
            **fields,
        }
        return self.post("/v1/completions", body, status=status)

    def level(self, name: str) -> dict[str, Any]:
        rows = self.get("/v1/levels")["data"]
        return next(row for row in rows if row["level"] == name)

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(self.url + path, timeout=2).status_code == 200
        except httpx.TransportError:
            return False
