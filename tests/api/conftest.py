"""One gateway on a real port for all tests of this folder that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.support.fake_pool import Gateway
from tests.support.live import LiveServer


@pytest.fixture(scope="package")
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture(scope="package")
def server(gateway: Gateway) -> Iterator[LiveServer]:
    with LiveServer(gateway.open) as server:
        yield server


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
