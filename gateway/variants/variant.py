"""What a variant is and which state it is in. Facts only: no torch, no engines, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.engine.base import EngineStats
from gateway.variants.card import Card


class State(StrEnum):
    """Life of a variant. Only `variants.pool` moves a variant from one state to another."""

    ABSENT = "absent"  # no bytes anywhere
    BUILDING = "building"  # a job makes it
    STORED = "stored"  # on disk or in Redis, not in memory
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # no new leases; unloaded when the last ends
    FAILED = "failed"  # the last build or load failed; `LevelFacts.error` says why


@dataclass(frozen=True, slots=True)
class LevelFacts:
    """One level of one model as `policy.decide` sees it.

    Attributes:
        level: recipe name, e.g. `int4-gptq-g128`.
        family: `dense`, `quantization`, `pruning`, `lowrank`, `distillation`.
        card: measured on this host, or an estimate (`card.measured` tells).
        stats: what its engine does now (zeros when it has none).
        leases: requests holding it.
        pinned: it stays in memory whatever needs room.
        error: why the last build or load failed, in one line.
        kv_bytes_per_token: KV-cache bytes one token of context takes; 0 when unknown.
        max_running: sequences its engine decodes at once; 0 when unknown.
        retry_s: seconds until a failed level is tried again; 0 when unknown or not failed.
    """

    level: str
    family: str
    state: State
    card: Card
    stats: EngineStats = EngineStats()
    leases: int = 0
    error: str | None = None
    kv_bytes_per_token: int = 0
    max_running: int = 0
    retry_s: float = 0.0
    pinned: bool = False

    @property
    def held(self) -> bool:
        """It cannot be unloaded for another level."""
        return self.pinned or self.leases > 0

    @property
    def loadable(self) -> bool:
        """Serving it needs no build."""
        return self.state in (State.READY, State.LOADING, State.STORED)


@dataclass(frozen=True, slots=True)
class LadderSnapshot:
    """Everything `decide` may know, taken at one moment.

    `memory_used` counts weights and KV pools of every resident variant, bytes; `building` is the
    number of builds running; `levels` is ordered best quality first. `weight_budget` bytes are what
    weights of all models may take (the rest is kept for KV pools; 0: all of `memory_budget`), and
    `weight_used` what they take now, levels being loaded included.
    """

    model: str
    levels: tuple[LevelFacts, ...]
    memory_budget: int
    memory_used: int
    building: int = 0
    host_running: int = 0
    host_waiting_prompt_tokens: int = 0
    weight_budget: int = 0
    weight_used: int = 0

    @property
    def for_weights(self) -> tuple[int, int]:
        """Bytes that weights may take and bytes taken of them; of all memory when weights have no
        budget of their own."""
        if self.weight_budget:
            return self.weight_budget, self.weight_used
        return self.memory_budget, self.memory_used

    def level(self, name: str) -> LevelFacts | None:
        return next((facts for facts in self.levels if facts.level == name), None)
