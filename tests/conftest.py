"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis_server import RedisServer


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A real, empty Redis of the test's own (starts in about 50 ms)."""
    with RedisServer() as server:
        yield server
