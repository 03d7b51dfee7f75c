"""The budget of one request: what it may cost, and how budgets combine. Pure data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["quality", "latency", "memory", "throughput"]
OnMiss = Literal["wait", "nearest", "reject"]

_Millis = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]


class Budget(BaseModel):
    """Upper bounds on one request; None means no bound. Times in ms, memory in MB (10^6 bytes).

    `memory_mb` bounds what the level keeps resident (weights) plus the request's own KV cache.
    `max_ppl_ratio` is compressed over dense perplexity; `min_agreement` the share of positions
    where the level's most likely token is dense's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_ms: _Millis | None = None
    tpot_ms: _Millis | None = None
    latency_ms: _Millis | None = None
    memory_mb: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    max_ppl_ratio: Annotated[float, Field(ge=1.0, le=1e6, allow_inf_nan=False)] | None = None
    min_agreement: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] | None = None

    def intersect(self, outer: Budget) -> Budget:
        """The tighter of the two bounds, field by field (a request can only tighten its policy)."""
        low = ("ttft_ms", "tpot_ms", "latency_ms", "memory_mb", "max_ppl_ratio")
        merged: dict[str, float | None] = {}
        for name in (*low, "min_agreement"):
            mine, theirs = getattr(self, name), getattr(outer, name)
            if mine is None or theirs is None:
                merged[name] = theirs if mine is None else mine
            else:
                merged[name] = min(mine, theirs) if name in low else max(mine, theirs)
        return Budget(**merged)


class Sla(Budget):
    """The `sla` field of a request: a budget plus which policy, objective and miss rule to use."""

    policy: Annotated[str, Field(max_length=64)] | None = None
    objective: Objective | None = None
    on_miss: OnMiss | None = None
