"""The Dockerfile's very commands, run without docker: entry point, defaults, health check."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Dockerfile
from tests.support.gateway_process import PRESSGATE, GatewayProcess

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "a-key-for-this-test"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return Dockerfile((DEPLOY / "Dockerfile").read_text())


def _environment(dockerfile: Dockerfile) -> dict[str, str]:
    """The image's ENV, but for what only makes sense in a container: PATH, port and folders."""
    ours = {"PATH", "PRESSGATE_PORT", "PRESSGATE_CACHE__DIR"}
    return {name: v for name, v in dockerfile.environment().items() if name not in ours}


def _command(dockerfile: Dockerfile) -> list[str]:
    entry = dockerfile.command("ENTRYPOINT")
    assert entry[0] == "pressgate"
    return [PRESSGATE, *entry[1:], *dockerfile.command("CMD")]


def _health(dockerfile: Dockerfile, gateway: GatewayProcess) -> int:
    command = dockerfile.healthcheck()
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]],
        env=os.environ | {"PRESSGATE_PORT": str(gateway.port)},
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode


def test_the_image_refuses_to_start_open_to_everybody(dockerfile: Dockerfile) -> None:
    gateway = GatewayProcess(command=_command(dockerfile), environment=_environment(dockerfile))
    with gateway:
        assert gateway.process is not None
        assert gateway.process.wait(timeout=60) == 2
    assert "api_keys" in gateway.log
    assert "Traceback" not in gateway.log


def test_the_images_commands_serve_answer_the_health_check_and_stop(
    dockerfile: Dockerfile,
) -> None:
    keys = [{"name": "test", "sha256": sha256(KEY.encode()).hexdigest()}]
    environment = _environment(dockerfile) | {"PRESSGATE_API_KEYS": json.dumps(keys)}
    with GatewayProcess(command=_command(dockerfile), environment=environment) as gateway:
        assert _health(dockerfile, gateway) != 0  # not up yet
        gateway.wait_ready()
        assert _health(dockerfile, gateway) == 0
        body = {"model": "docs-17m", "prompt": "The function returns", "max_tokens": 4}
        assert gateway.call("POST", "/v1/completions", body)[0] == 401
        allowed = {"authorization": f"Bearer {KEY}"}
        status, answer = gateway.call("POST", "/v1/completions", body, allowed)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        status, text = gateway.call("GET", "/metrics")  # Prometheus has no key
        assert status == 200
        assert "pressgate_requests_total" in text
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGTERM)  # what `docker stop` sends to process 1
        assert gateway.process.wait(timeout=30) in (0, -signal.SIGTERM)
    assert KEY not in gateway.log
    shutil.rmtree(gateway.folder)
