"""The budget of one request: what it may cost, and how budgets combine. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["quality", "latency", "memory", "throughput"]
OnMiss = Literal["wait", "nearest", "reject"]

HARD: Final = frozenset({"memory_mb", "max_ppl_ratio", "min_agreement"})  # never traded for another
Bounds = tuple[tuple[str, float], ...]

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
        mine = self.bounds()
        if not mine and type(outer) is Budget:
            return outer
        merged = dict(outer.bounds())
        for name, bound in mine:
            theirs = merged.get(name, bound)
            merged[name] = max(bound, theirs) if name == "min_agreement" else min(bound, theirs)
        return Budget(**merged)

    def bounds(self) -> Bounds:
        """The bounds that are set, as (field, value), in field order."""
        values = self.__dict__
        return tuple([(name, values[name]) for name in _FIELDS if values[name] is not None])


_FIELDS: Final = tuple(Budget.model_fields)


class Sla(Budget):
    """The `sla` field of a request: a budget plus which policy, objective and miss rule to use."""

    policy: Annotated[str, Field(max_length=64)] | None = None
    objective: Objective | None = None
    on_miss: OnMiss | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """What a request costs, predicted or measured; fields named after the bounds they answer to.

    None: not known (e.g. no time per output token for a one-token answer); it breaks no bound.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    latency_ms: float | None = None
    memory_mb: float | None = None
    max_ppl_ratio: float | None = None
    min_agreement: float | None = None


def excess(bounds: Iterable[tuple[str, float]], costs: Costs) -> dict[str, float]:
    """The bounds that `costs` breaks, each with how far beyond it is, relative to the bound.

    Empty means every bound is kept: a measured answer with no excess has met its budget.
    """
    broken: dict[str, float] = {}
    for name, bound in bounds:
        value = getattr(costs, name)
        if value is None:
            continue
        over = bound - value if name == "min_agreement" else value - bound
        if not over <= 0:  # so that a NaN keeps no bound
            broken[name] = over / bound if over < math.inf and bound else math.inf
    return broken
