"""A process run as the image would run it: the Dockerfile's command and environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.deploy.dockerfile import Dockerfile

PROGRAMS = Path(sys.executable).parent
# What only makes sense inside a container.
_REPLACED = ("PATH", "PRESSGATE_PORT", "PRESSGATE_CACHE__DIR")


class ImageProcess:
    """Context manager around ENTRYPOINT + CMD; `log` holds everything it printed."""

    def __init__(
        self, dockerfile: Dockerfile, folder: Path, port: int, environment: Mapping[str, str]
    ) -> None:
        entry, *arguments = dockerfile.command("ENTRYPOINT") + dockerfile.command("CMD")
        self._dockerfile = dockerfile
        self._folder = folder
        self._command = [PROGRAMS / entry, *arguments]
        image = {k: v for k, v in dockerfile.environment().items() if k not in _REPLACED}
        ours = {k: v for k, v in os.environ.items() if not k.startswith("PRESSGATE_")}
        here = {"PRESSGATE_PORT": str(port), "PRESSGATE_CACHE__DIR": str(folder / "cache")}
        self._environment = ours | image | here | dict(environment)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> ImageProcess:
        with (self._folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def healthy(self) -> bool:
        """Run the image's HEALTHCHECK command beside the process."""
        program, *arguments = self._dockerfile.healthcheck()
        command = [PROGRAMS / program, *arguments]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, timeout=30, check=False
        )
        return done.returncode == 0

    def wait_healthy(self, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not self.healthy():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log

    def complete(self, key: str | None) -> httpx.Response:
        body = {"model": "docs-17m", "prompt": "The function returns", "max_tokens": 4}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=120)
