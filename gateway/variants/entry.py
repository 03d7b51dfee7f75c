"""One level of one model inside the pool: its mutable record and its face to the outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.engine.base import Engine, EngineStats
from gateway.errors import Overloaded, Unavailable
from gateway.variants.backend import Backend, LevelSpec
from gateway.variants.jobs import BuildFailed
from gateway.variants.variant import LevelFacts, State
from gateway.variants.worth import Demand, occupied

RETRY_FAILED_AFTER = 30.0  # a failed level is not tried again by requests before this many seconds
IDLE_STATS = EngineStats()


@dataclass(slots=True)
class Variant:
    """One level of one model. Fields are changed by `VariantPool` and its `Builder` only."""

    backend: Backend
    spec: LevelSpec
    state: State = State.ABSENT
    engine: Engine | None = None
    resident_bytes: int = 0
    leases: int = 0
    error: str | None = None
    failed_at: float = 0.0
    failed_in: State = State.BUILDING  # what was tried when it failed
    last_used: float = 0.0
    load_s: float = 0.0  # what the last load took
    pinned: bool = False  # stays in memory whatever needs room
    demand: Demand = field(default_factory=Demand)
    held: object = None  # keeps the artifact's files from eviction while it is loaded
    loading: asyncio.Task[None] | None = None
    building: asyncio.Task[None] | None = None
    unloading: asyncio.Task[None] | None = None
    job_id: str | None = None

    @property
    def name(self) -> str:
        return f"{self.backend.model}@{self.spec.level}"

    @property
    def place(self) -> str:
        """What its weights live in, among all models."""
        return f"{self.backend.model}@{self.backend.memory(self.spec.level)}"

    @property
    def needs_build(self) -> bool:
        """Its bytes have to be made before it can be loaded (or are being made)."""
        failed_build = self.state is State.FAILED and self.failed_in is not State.LOADING
        return failed_build or self.state in (State.ABSENT, State.BUILDING)

    def drop(self) -> None:
        """Forget the engine and what it held."""
        self.engine, self.held, self.resident_bytes = None, None, 0

    def fail(self, why: str, now: float) -> None:
        """The build or load under way failed at `now`."""
        self.failed_in = self.state
        self.state, self.error, self.failed_at = State.FAILED, why, now

    def facts(self, now: float, stats: EngineStats) -> LevelFacts:
        """What deciders may know of it; `stats`: what its engine does (idle when it has none).
        A failure is over when it may be tried again."""
        state, retry_s = self.state, 0.0
        if state is State.FAILED:
            retry_s = max(0.0, RETRY_FAILED_AFTER - (now - self.failed_at))
            if not retry_s:
                state = State.STORED if self.failed_in is State.LOADING else State.ABSENT
        return LevelFacts(
            level=self.spec.level,
            family=self.spec.family,
            state=state,
            card=self.backend.card(self.spec.level),
            stats=stats,
            leases=self.leases,
            pinned=self.pinned,
            error=self.error,
            kv_bytes_per_token=self.backend.kv_bytes_per_token(self.spec.level),
            retry_s=retry_s,
            max_running=self.backend.max_running,
        )


def weight_bytes(variants: Iterable[Variant]) -> int:
    """Bytes of weights resident or being loaded; levels that live in the same memory count once,
    with the largest of them."""
    return occupied((v.place, v.resident_bytes) for v in variants if v.resident_bytes)


def reraise(task: asyncio.Task[None], name: str) -> None:
    """Turn a failed step into what a caller can act on."""
    if task.cancelled():
        raise Unavailable(f"{name}: the work was cancelled", retry_after=1.0)
    error = task.exception()
    if error is None:
        return
    if isinstance(error, (Overloaded, Unavailable)):
        raise error
    raise Unavailable(
        f"{name} cannot be had: {error}" if isinstance(error, BuildFailed) else f"{name} failed",
        retry_after=RETRY_FAILED_AFTER,
    ) from error
