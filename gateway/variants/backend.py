"""Where a model's levels come from: the seam between the pool and the things that act.

A backend builds and loads; it keeps no state machine, counts no leases and decides nothing.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.engine.base import Engine, TextCodec
from gateway.variants.card import Card

ProgressFn = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class LevelSpec:
    """One level a backend can offer."""

    level: str
    family: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A level in memory. `resident_bytes` counts weights, not KV; `held` lives as long as it."""

    engine: Engine
    resident_bytes: int
    load_seconds: float
    held: object = None


class Backend(Protocol):
    """All levels of one model."""

    model: str
    context_length: int
    max_running: int
    default_level: str

    @property
    def tokenizer(self) -> TextCodec: ...

    async def start(self) -> None:
        """Read what is needed to answer the calls below.

        Raises:
            ModelError: the model cannot be served.
        """
        ...

    def ladder(self) -> tuple[LevelSpec, ...]: ...

    async def stored(self, level: str) -> bool:
        """Can `load` do without a build? (Bytes on disk or in Redis, or the checkpoint itself.)"""
        ...

    def card(self, level: str) -> Card:
        """Measured card of this host if there is one, else an estimate."""
        ...

    def kv_bytes_per_token(self, level: str) -> int:
        """KV bytes that one token of context takes at this level."""
        ...

    def load_bytes(self, level: str) -> int:
        """Bytes `load` will make resident, best knowledge."""
        ...

    def artifact(self, level: str) -> str:
        """What the level is loaded from: levels that answer alike are made, stored and deleted
        together."""
        ...

    def memory(self, level: str) -> str:
        """What its weights live in: of levels that answer alike the smaller ones' bytes are among
        the largest's, so that together they take no more than that."""
        ...

    async def load(self, level: str) -> Loaded | None:
        """Bring a stored level into memory; None when its bytes turned out to be gone or altered.

        Raises:
            MemoryError, EngineFailed: it cannot be held.
        """
        ...

    async def build(self, level: str, on_progress: ProgressFn) -> None:
        """Make the level's artifact and card; returns at once if another process just made them.

        Raises:
            BuildFailed: with one line for people.
        """
        ...

    async def delete(self, level: str) -> None:
        """Forget the level's artifact on disk and in Redis."""
        ...

    async def close(self) -> None: ...
