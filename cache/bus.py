"""Pub/sub over Redis that survives Redis: one subscription, many listeners.

Messages may be lost while Redis is away; so every listener is also told when the subscription
(re)starts, and then looks for itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from cache.link import RedisAway, RedisLink
from cache.threads import ended

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
Listener = Callable[[bytes | None], Awaitable[None]]
"""Called with a message, or with None when messages may have been missed."""


class Bus:
    """Channels under one prefix. Listening starts a background task; `close` ends it."""

    def __init__(self, link: RedisLink, prefix: str) -> None:
        self._link = link
        self._prefix = f"{prefix}bus:"
        self._listeners: defaultdict[str, list[Listener]] = defaultdict(list)
        self._task: asyncio.Task[None] | None = None

    def listen(self, channel: str, listener: Listener) -> Callable[[], None]:
        """Call `listener` for every message on `channel`; returns what ends it."""
        listeners = self._listeners[channel]
        listeners.append(listener)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

        def stop() -> None:
            with suppress(ValueError):
                listeners.remove(listener)

        return stop

    def channel(self, name: str) -> str:
        """The full channel name, for scripts that publish."""
        return self._prefix + name

    async def close(self) -> None:
        if self._task is not None:
            await ended(self._task)
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                await self._subscribed()
            except (RedisError, OSError) as error:
                self._link.failed(error)
            except RedisAway:
                pass  # known already: wait for it below
            await asyncio.sleep(0.05)  # a server that accepts and drops must not make us spin
            await self._link.until_up()

    async def _subscribed(self) -> None:
        async with self._link.subscriber.pubsub() as pubsub:
            async with asyncio.timeout(self._link.timeout):
                await pubsub.psubscribe(self._prefix + "*")
            silent = 0
            while silent < 2:
                message = await pubsub.get_message(timeout=HEARTBEAT_SECONDS)
                if message is None:
                    silent += 1
                    await pubsub.ping()
                    continue
                silent = 0
                await self._dispatch(message)
            raise TimeoutError("pub/sub went silent")

    async def _dispatch(self, message: dict[str, Any]) -> None:
        if message["type"] == "psubscribe":
            for channel in list(self._listeners):
                await self._tell(channel, None)
        elif message["type"] == "pmessage":
            channel = message["channel"].decode().removeprefix(self._prefix)
            await self._tell(channel, message["data"])

    async def _tell(self, channel: str, message: bytes | None) -> None:
        for listener in list(self._listeners.get(channel, ())):
            try:
                await listener(message)
            except Exception:
                log.exception("a listener on %s failed", channel)
