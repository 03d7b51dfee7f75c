"""Two hosts' disks and the Redis tier between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.disk import DiskStore
from cache.redis import RedisStore
from tests.cache.samples import MIB, redis_store
from tests.support.redis_server import RedisServer


@pytest.fixture
def here(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "here", 256 * MIB)


@pytest.fixture
def there(tmp_path: Path) -> DiskStore:
    """The disk of another host."""
    return DiskStore(tmp_path / "there", 256 * MIB)


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    redis = redis_store(redis_server.url)
    yield redis
    await redis.close()
