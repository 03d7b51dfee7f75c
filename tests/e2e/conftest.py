"""One gateway with the bundled model for every test that only asks questions of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gateway_process import GatewayProcess

LEVELS = ["fp32", "int8", "int4-rtn-g64", "int4-gptq-g128", "depth-75"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path_factory.mktemp("gateway"), {"levels": LEVELS}) as process:
        yield process
