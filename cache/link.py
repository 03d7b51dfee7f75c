"""The one connection pool to Redis and its circuit breaker.

Everything in the cache that talks to Redis does so through `RedisLink.call`, which either returns
what Redis said or raises `RedisAway` at once or within the timeout. When Redis fails, the link goes
down, further calls fail without waiting, and a probe in the background brings it up again. One log
line per change. The password in the URL is never logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from cache.threads import ended

T = TypeVar("T")
Client = Any
"""`redis.asyncio.Redis`, whose own annotations mix its blocking and its async twin."""

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
_FIRST_PROBE_SECONDS = 0.1
_LAST_PROBE_SECONDS = 5.0
_STEADY_SECONDS = 10.0  # up for less than this: flapping, so the pause before a probe keeps growing


class RedisAway(Exception):
    """Redis cannot be used now. Stays inside the cache package; nobody outside meets it."""


class RedisRefused(RedisAway):
    """Redis answered, but not with what was asked: out of memory, read-only, no permission."""


class RedisLink:
    """Calls to one Redis, for one event loop.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with credentials where needed.
        timeout: seconds for one call, connecting and waiting for a free connection included.
        on_state: told True when Redis becomes usable and False when it stops being so.
    """

    def __init__(
        self, url: str, *, timeout: float, on_state: Callable[[bool], None] = lambda _up: None
    ) -> None:
        self.timeout = timeout
        self.where = _without_secrets(url)
        self._on_state = on_state
        self._client = self.connect(url, timeout, MAX_CONNECTIONS)
        self._subscriber = self.connect(url, None, 1)
        self._up: bool | None = None
        self._refusing = False
        self._came_up = asyncio.Event()
        self._up_since = 0.0
        self._pause = _FIRST_PROBE_SECONDS
        self._probe: asyncio.Task[None] | None = None
        self._closed = False

    @staticmethod
    def connect(url: str, timeout: float | None, connections: int) -> Client:
        """A client without retries of its own: the breaker decides what a failure means."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout or 5.0,
            socket_read_size=2**18,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        return Redis(connection_pool=pool)

    @property
    def up(self) -> bool:
        """The last contact succeeded. False before the first."""
        return self._up is True

    @property
    def subscriber(self) -> Client:
        """A client without read timeout, for pub/sub only; failures go to `failed`."""
        return self._subscriber

    async def call(self, operation: Callable[[Client], Awaitable[T]], *, patience: float = 1) -> T:
        """Do `operation` within `patience` × the timeout.

        Raises:
            RedisAway: down, unreachable, or too slow.
            RedisRefused: the server refused the command.
        """
        if self._up is False or self._closed:
            raise RedisAway(f"Redis at {self.where} is down")
        try:
            async with asyncio.timeout(self.timeout * patience):
                result = await operation(self._client)
        except ResponseError as error:
            self._succeeded()
            self._refused(error)
            raise RedisRefused(str(error)) from error
        except (RedisError, OSError) as error:  # asyncio's TimeoutError is an OSError
            self.failed(error)
            raise RedisAway(str(error)) from error
        self._succeeded()
        return result

    async def command(self, *arguments: Any) -> Any:
        """One command; bytes, numbers and lists come back as Redis sent them."""
        return await self.call(lambda client: client.execute_command(*arguments))

    async def ping(self) -> bool:
        """Try Redis now, whatever the state was."""
        try:
            async with asyncio.timeout(self.timeout):
                await self._client.execute_command("PING")
        except (RedisError, OSError) as error:
            self.failed(error)
            return False
        self._succeeded()
        return True

    async def until_up(self) -> None:
        """Return when Redis is usable (or was never tried)."""
        if self._up is False:
            await self._came_up.wait()

    def wrote(self) -> None:
        """A write went through: Redis no longer refuses them."""
        if self._refusing:
            self._refusing = False
            log.info("Redis at %s takes writes again", self.where)

    def failed(self, error: BaseException) -> None:
        """Contact failed: go down and start probing."""
        if self._up is not False and not self._closed:
            why = str(error) or type(error).__name__
            log.warning("Redis at %s is away (%s): disk only until it is back", self.where, why)
            flapping = self._up and _now() - self._up_since < _STEADY_SECONDS
            self._pause = self._pause if flapping else _FIRST_PROBE_SECONDS
            self._up = False
            self._came_up.clear()
            self._on_state(False)
            self._probe = asyncio.create_task(self._probe_until_up())

    async def close(self) -> None:
        """Stop probing and close all connections. Idempotent."""
        self._closed = True
        if self._probe is not None:
            await ended(self._probe)
        for client in (self._client, self._subscriber):
            with suppress(RedisError, OSError):
                await client.aclose()
                await client.connection_pool.disconnect()

    def _succeeded(self) -> None:
        if self._up is True or self._closed:
            return
        log.info("Redis at %s is %s", self.where, "up" if self._up is None else "back")
        self._up = True
        self._up_since = _now()
        self._came_up.set()
        self._on_state(True)

    def _refused(self, error: ResponseError) -> None:
        if not self._refusing:
            self._refusing = True
            log.warning("Redis at %s refuses (%s): going on without", self.where, error)

    async def _probe_until_up(self) -> None:
        while self._up is False:
            await asyncio.sleep(self._pause)
            self._pause = min(self._pause * 2, _LAST_PROBE_SECONDS)
            await self.ping()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
