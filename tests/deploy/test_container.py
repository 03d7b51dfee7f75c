"""The Dockerfile's very commands, run without docker: entry point, defaults, health check."""

from __future__ import annotations

import json
import signal
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from tests.deploy.container import ImageProcess
from tests.deploy.dockerfile import Dockerfile
from tests.support.gateway_process import free_port

DOCKERFILE = Path(__file__).parents[2] / "deploy" / "Dockerfile"
KEY = "a-key-for-this-test"
pytestmark = pytest.mark.slow


def _image(folder: Path, **environment: str) -> ImageProcess:
    return ImageProcess(Dockerfile(DOCKERFILE.read_text()), folder, free_port(), environment)


def test_the_image_refuses_to_start_open_to_everybody(tmp_path: Path) -> None:
    with _image(tmp_path) as gateway:
        assert gateway.process.wait(timeout=60) == 2
    assert "api_keys" in gateway.log
    assert "Traceback" not in gateway.log


def test_the_images_commands_serve_tell_their_health_and_stop(tmp_path: Path) -> None:
    keys = json.dumps([{"name": "test", "sha256": sha256(KEY.encode()).hexdigest()}])
    with _image(tmp_path, PRESSGATE_API_KEYS=keys) as gateway:
        assert not gateway.healthy()  # not up yet
        gateway.wait_healthy()
        assert gateway.complete(key=None).status_code == 401
        answer = gateway.complete(key=KEY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        metrics = httpx.get(f"{gateway.url}/metrics", timeout=30)  # Prometheus has no key
        assert "pressgate_requests_total" in metrics.text
        gateway.process.send_signal(signal.SIGTERM)  # what `docker stop` sends to process 1
        assert gateway.process.wait(timeout=30) in (0, -signal.SIGTERM)
    assert KEY not in gateway.log
