"""A model's levels without a server: what `levels`, `compress`, `bench` and `search` work on."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.variants.local_backend import LocalBackend
from gateway.variants.variant import LadderSnapshot, LevelFacts, State


@asynccontextmanager
async def workshop(settings: Settings) -> AsyncIterator[LocalBackend]:
    """The first configured model, opened but not loaded.

    Raises:
        ModelError, ConfigError, InvalidRequest.
    """
    from gateway.app import open_backends

    async with open_backends(settings) as parts:
        backend = parts.backends[0]
        if not isinstance(backend, LocalBackend):
            raise InvalidRequest(f"{backend.model} has no weights to work on", param="model")
        await backend.start()
        yield backend


def progress_bars() -> Progress:
    """Bars on stderr, only when a person watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


async def snapshot_of(backend: LocalBackend, memory_budget: int) -> LadderSnapshot:
    """The ladder as a gateway that just started would see it: nothing loaded but the default."""
    levels = []
    for spec in backend.ladder():
        state = State.STORED if await backend.stored(spec.level) else State.ABSENT
        if spec.level == backend.default_level:
            state = State.READY
        levels.append(
            LevelFacts(
                level=spec.level,
                family=spec.family,
                state=state,
                card=backend.card(spec.level),
                kv_bytes_per_token=backend.kv_bytes_per_token(spec.level),
                max_running=backend.max_running,
            )
        )
    levels.sort(key=lambda facts: facts.card.loss)
    return LadderSnapshot(
        model=backend.model,
        levels=tuple(levels),
        memory_budget=memory_budget,
        memory_used=backend.card(backend.default_level).resident_bytes,
    )
