"""What "best" means: one function per objective, each a tuple of cost columns, lower is better.
Pure.

Adding an objective: its name in `budget.Objective`, one function, one line in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gateway.policy.budget import Costs, Objective
from gateway.policy.columns import Columns, Floats
from gateway.policy.prediction import Prediction
from gateway.variants.variant import LevelFacts

Key = tuple[float, ...]


@dataclass(slots=True)
class Option:
    """A level with what it would cost this request.

    Attributes:
        predicted: when used now (for a level that must be built: once it is in memory).
        judged: what its bounds are judged by: times that the promised share of answers keeps, from
            the request's arrival on; None: it keeps them all.
        broken: bounds it breaks, with the relative excess.
        rank: the policy's order of preference, for ties.
        barrier: why it cannot be used whatever its numbers are, or "".
    """

    facts: LevelFacts
    predicted: Prediction
    judged: Costs | None
    broken: Mapping[str, float]
    rank: int
    barrier: str = ""

    @property
    def level(self) -> str:
        return self.facts.level

    @property
    def fits(self) -> bool:
        return not self.broken and not self.barrier


@dataclass(slots=True, eq=False)
class Prices:
    """What the objectives order by, for every level: facts, MB, and ms for all of the answer."""

    facts: Columns
    memory_mb: Floats
    latency_ms: Floats


Order = tuple[Floats, ...]


def _quality(prices: Prices) -> Order:
    # Of equals the smaller: the momentarily quicker would spread one class of requests over
    # several levels, which then slow each other down.
    return (prices.facts.loss, prices.memory_mb, prices.latency_ms)


def _latency(prices: Prices) -> Order:
    return (prices.latency_ms, prices.facts.loss, prices.memory_mb)


def _memory(prices: Prices) -> Order:
    return (prices.memory_mb, prices.facts.loss, prices.latency_ms)


def _throughput(prices: Prices) -> Order:
    return (prices.facts.token_ms, prices.facts.loss, prices.latency_ms)


OBJECTIVES: Final[Mapping[Objective, Callable[[Prices], Order]]] = MappingProxyType(
    {"quality": _quality, "latency": _latency, "memory": _memory, "throughput": _throughput}
)

PRAISE: Final[Mapping[Objective, str]] = MappingProxyType(
    {
        "quality": "the best quality",
        "latency": "the lowest latency",
        "memory": "the smallest memory",
        "throughput": "the highest throughput",
    }
)


def gain(better: Key, worse: Key) -> float:
    """How much cheaper `better` is in the first cost that differs, relative; 0 when it is not."""
    for low, high in zip(better, worse, strict=True):
        if low != high:
            return min(100.0, max(0.0, high / low - 1.0)) if low > 0 else 100.0 * (low < high)
    return 0.0
