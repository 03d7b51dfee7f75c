"""One gateway with the bundled model for every test that only asks questions of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import PATIENT, wait_for_jobs
from tests.support.gateway_process import GatewayProcess

LEVELS = ["fp32", "int8", "int4-rtn-g64", "int4-gptq-g128", "depth-75"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    config = {"levels": LEVELS, "shadow": {"rate": 1.0}}
    with GatewayProcess(tmp_path_factory.mktemp("gateway"), config) as process:
        yield process


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with bf16 measured and int8 built and measured; copy it, never change it."""
    home = tmp_path_factory.mktemp("built")
    with GatewayProcess(home, PATIENT, ready_s=280) as process:
        process.complete(model="docs-17m@int8", sla={"on_miss": "wait"})
        jobs = wait_for_jobs(process)
        assert {job["state"] for job in jobs} == {"done"}, process.log
    return home / "cache"
