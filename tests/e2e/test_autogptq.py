"""The level built by the real auto-gptq, in the worker process, served by our own kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.gateway_process import GatewayProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LEVEL = "int4-autogptq-g128"


def test_an_auto_gptq_level_is_built_on_the_fly_and_served(tmp_path: Path) -> None:
    if importlib.util.find_spec("auto_gptq") is None:  # a plain import fails without our compat
        pytest.skip("pip install 'pressgate[auto-gptq]'")
    with GatewayProcess(tmp_path, {"levels": [LEVEL]}) as gateway:
        gateway.post(f"/v1/levels/{LEVEL}:warm", timeout=600)
        answer = gateway.complete(model=f"docs-17m@{LEVEL}")
        assert answer["compression"]["level"] == LEVEL
        assert answer["usage"]["completion_tokens"] == 8
        row = gateway.level(LEVEL)
        assert row["measured"]
        assert row["stored_bytes"] < 15e6
        assert 0.005 < row["kl_nats"] < 0.2, "4 bits lose something, and not much"
