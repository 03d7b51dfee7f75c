"""Opens what remembers requests: the ledger of decisions with its journal and its log, and tracing.
Wires only: part of the composition root.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from cache.errors import CacheError
from cache.journal import Journal
from cache.redis import RedisStore
from gateway.api.decision_log import DecisionLog, Decode
from gateway.api.explain import floors_of
from gateway.api.ledger import PREFIX, Ledger
from gateway.api.tracing import Traces, open_traces
from gateway.config import Settings
from gateway.metrics import Metrics
from gateway.variants.pool import VariantPool

log = logging.getLogger(__name__)

_FILE: Final = "decisions.sqlite"


@asynccontextmanager
async def open_ledger(
    settings: Settings, pool: VariantPool, metrics: Metrics, redis: RedisStore | None
) -> AsyncIterator[Ledger]:
    """A ledger that writes in the background, and once more at the end.

    Raises:
        ConfigError: the decision log cannot be written.
    """
    ledger = Ledger(
        await _journal(settings, redis),
        await asyncio.to_thread(_log, settings, pool),
        ttl=settings.decisions.keep_seconds,
        floors={key.name: floors_of(key.floors) for key in settings.api_keys},
        on_lost=metrics.unrecorded,
    )
    work = asyncio.create_task(ledger.run())
    try:
        yield ledger
    finally:
        work.cancel()
        await ledger.close()


@asynccontextmanager
async def open_tracing(settings: Settings, pool: VariantPool) -> AsyncIterator[Traces | None]:
    """What makes traces; None when the configuration does not ask for them.

    Raises:
        ConfigError: the OpenTelemetry packages are not installed.
    """
    traces = await asyncio.to_thread(open_traces, settings.tracing, _decode(pool))
    try:
        yield traces
    finally:
        if traces is not None:
            await asyncio.to_thread(traces.close)


async def _journal(settings: Settings, redis: RedisStore | None) -> Journal | None:
    """None when the disk does not take one: then the last decisions are kept in memory."""
    wanted = settings.decisions
    try:
        return await asyncio.to_thread(
            Journal,
            settings.cache.root / _FILE,
            prefix=PREFIX,
            ttl=wanted.keep_seconds,
            budget=wanted.disk_budget,
            redis=redis,
            redis_budget=wanted.redis_budget,
        )
    except CacheError as error:
        log.warning("decisions are kept in memory only: %s", error)
        return None


def _log(settings: Settings, pool: VariantPool) -> DecisionLog | None:
    wanted = settings.decisions
    if wanted.log is None:
        return None

    return DecisionLog(
        wanted.log.expanduser(),
        max_bytes=wanted.log_bytes,
        files=wanted.log_files,
        decode=_decode(pool) if wanted.log_text else None,
    )


def _decode(pool: VariantPool) -> Decode:
    def decode(model: str, ids: Sequence[int]) -> str:
        # An upstream's tokens may have no id here.
        return pool.tokenizer(model).decode([token for token in ids if token >= 0])

    return decode
