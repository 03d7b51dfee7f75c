"""What "best" means: one function per objective, each a tuple of costs, lower is better. Pure.

Adding an objective: its name in `budget.Objective`, one function, one line in `OBJECTIVES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gateway.policy.budget import Objective
from gateway.policy.predictor import Prediction
from gateway.variants.variant import LevelFacts

Key = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """A level with what it would cost this request.

    Attributes:
        predicted: when used now (for a level that must be built: once it is in memory).
        broken: bounds it breaks, with the relative excess.
        rank: the policy's order of preference, for ties.
        barrier: why it cannot be used whatever its numbers are, or "".
    """

    facts: LevelFacts
    predicted: Prediction
    broken: Mapping[str, float]
    rank: int
    barrier: str = ""

    @property
    def level(self) -> str:
        return self.facts.level

    @property
    def fits(self) -> bool:
        return not self.broken and not self.barrier


def loss(option: Option) -> float:
    """`Card.loss` in steps of 0.1 %: closer levels cannot be told apart by the texts at hand, and
    noise must not send everybody to a slower level."""
    exact = option.facts.card.loss
    return exact if math.isinf(exact) else round(exact, 3)


def _quality(option: Option) -> Key:
    # Of equals the smaller: the momentarily quicker would spread one class of requests over
    # several levels, which then slow each other down.
    return (loss(option), option.predicted.memory_mb, option.predicted.latency_ms)


def _latency(option: Option) -> Key:
    return (option.predicted.latency_ms, loss(option), option.predicted.memory_mb)


def _memory(option: Option) -> Key:
    return (option.predicted.memory_mb, loss(option), option.predicted.latency_ms)


def _throughput(option: Option) -> Key:
    rates = option.facts.card.decode_tokens_per_s.values()
    rate = max((rate for rate in rates if rate > 0), default=0.0)
    ms_per_token = 1000.0 / rate if rate else math.inf
    return (ms_per_token, loss(option), option.predicted.latency_ms)


OBJECTIVES: Final[Mapping[Objective, Callable[[Option], Key]]] = MappingProxyType(
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


def key(objective: Objective, option: Option) -> Key:
    """Total order of options: the objective's costs, then the policy's preference."""
    return (*OBJECTIVES[objective](option), option.rank)


def gain(objective: Objective, better: Option, worse: Option) -> float:
    """How much cheaper `better` is in the first cost that differs, relative; 0 when it is not."""
    pairs = zip(OBJECTIVES[objective](better), OBJECTIVES[objective](worse), strict=True)
    for low, high in pairs:
        if low != high:
            return min(100.0, max(0.0, high / low - 1.0)) if low > 0 else 100.0 * (low < high)
    return 0.0
