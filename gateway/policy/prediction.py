"""What a request would cost: at one level as numbers, at every level as arrays. Pure data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

from gateway.policy.columns import Columns, Floats


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted costs of one request at one level. Times in ms, memory in MB (10^6 bytes).

    `latency_ms` is for all of `max_tokens`, so it is an upper view: answers that stop early are
    faster. `load_ms` is the part of `ttft_ms` (and so of `latency_ms`) spent loading or building
    the level; `*_factor` are the learned corrections already applied to the rest.
    """

    ttft_ms: float
    tpot_ms: float
    latency_ms: float
    memory_mb: float
    load_ms: float = 0.0
    ttft_factor: float = 1.0
    tpot_factor: float = 1.0

    def warmed(self) -> Prediction:
        """The same request once the level is in memory."""
        return self if self.load_ms == 0.0 else self.delayed(-self.load_ms)

    def delayed(self, ms: float) -> Prediction:
        """The same request after `ms` more of building or loading."""
        return replace(
            self,
            ttft_ms=self.ttft_ms + ms,
            latency_ms=self.latency_ms + ms,
            load_ms=self.load_ms + ms,
        )

    def numbers(self) -> dict[str, float]:
        """The four costs, rounded for people and JSON."""
        return {
            "ttft_ms": round(self.ttft_ms, 1),
            "tpot_ms": round(self.tpot_ms, 2),
            "latency_ms": round(self.latency_ms, 1),
            "memory_mb": round(self.memory_mb, 2),
        }


@dataclass(slots=True, eq=False)
class Times:
    """The two times that a load or a build delays, for every level; ms."""

    ttft_ms: Floats
    latency_ms: Floats

    def delayed(self, ms: Floats) -> Times:
        return Times(self.ttft_ms + ms, self.latency_ms + ms)


@dataclass(slots=True, eq=False)
class Predictions(Sequence[Prediction]):
    """One prediction per level, in ladder order: arrays, and `Prediction` objects on demand.

    Fields are those of `Prediction` and are never written to.

    Attributes:
        columns: the facts of the same levels.
        build_ms: `load_ms` of the levels that must be built first, 0 of the others.
        idle_bytes: resident bytes of ready levels that no request holds.
        calm: gives the same for a host on which nobody else is served.
    """

    columns: Columns
    idle_bytes: float
    ttft_ms: Floats
    tpot_ms: Floats
    latency_ms: Floats
    memory_mb: Floats
    load_ms: Floats
    build_ms: Floats
    ttft_factor: Floats
    tpot_factor: Floats
    calm: Callable[[], Predictions]

    def times(self) -> Times:
        """Of use now; of levels that must be built first: once they are in memory."""
        if not self.columns.any_unbuilt:
            return Times(self.ttft_ms, self.latency_ms)
        return Times(self.ttft_ms - self.build_ms, self.latency_ms - self.build_ms)

    def warm_times(self) -> Times:
        """Of use once the level is in memory."""
        return Times(self.ttft_ms - self.load_ms, self.latency_ms - self.load_ms)

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, row: int) -> Prediction: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[Prediction, ...]: ...
    def __getitem__(self, row: int | slice) -> Prediction | tuple[Prediction, ...]:
        if isinstance(row, slice):
            return tuple(self[i] for i in range(*row.indices(len(self))))
        return Prediction(
            ttft_ms=self.ttft_ms.item(row),
            tpot_ms=self.tpot_ms.item(row),
            latency_ms=self.latency_ms.item(row),
            memory_mb=self.memory_mb.item(row),
            load_ms=self.load_ms.item(row),
            ttft_factor=self.ttft_factor.item(row),
            tpot_factor=self.tpot_factor.item(row),
        )
