"""What a request would cost: at one level as numbers, at every level as arrays. Pure data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import overload

import numpy as np

from gateway.policy.causes import FirstToken, Token
from gateway.policy.columns import Columns, Floats
from gateway.policy.lengths import Length
from gateway.policy.quantile import KINDS, MarginColumns, Margins

Causes = Callable[[], tuple[FirstToken, Token]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted costs of one request at one level. Times in ms, memory in MB (10^6 bytes).

    These are means; `high` gives upper quantiles. `latency_ms` is for as many tokens as are
    expected (`length`; of all `max_tokens` where nothing is known). `load_ms` is the part of
    `ttft_ms` (and so of `latency_ms`) spent loading or building the level; `*_factor` are the
    level's own learned corrections, already applied to the rest; `causes` tells what the rest was
    made of, to learn from.
    """

    ttft_ms: float
    tpot_ms: float
    latency_ms: float
    memory_mb: float
    load_ms: float = 0.0
    ttft_factor: float = 1.0
    tpot_factor: float = 1.0
    length: Length = field(default_factory=lambda: Length.certain(1))
    margins: Margins = field(default_factory=Margins)
    causes: Causes | None = field(default=None, repr=False, compare=False)

    def high(self, confidence: float) -> Prediction:
        """The times that a share `confidence` of answers keeps; what is loaded or built before them
        counts as it is, memory is certain."""
        ttft, tpot, latency = (self.margins.factor(kind, confidence) for kind in range(len(KINDS)))
        own = self.latency_ms - self.load_ms
        more = self.length.upper(confidence) - self.length.expected
        if more and own > 0.0:
            latency = _joint(latency, (own + more * self.tpot_ms) / own)
        return replace(
            self,
            ttft_ms=self.load_ms + (self.ttft_ms - self.load_ms) * ttft,
            tpot_ms=self.tpot_ms * tpot,
            latency_ms=self.load_ms + own * latency,
        )

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

    def numbers(self, confidence: float | None = None) -> dict[str, float]:
        """The four costs, rounded for people and JSON; with a confidence also the times that this
        share of answers keeps, and what the answer's length is taken to be."""
        told = {
            "ttft_ms": round(self.ttft_ms, 1),
            "tpot_ms": round(self.tpot_ms, 2),
            "latency_ms": round(self.latency_ms, 1),
            "memory_mb": round(self.memory_mb, 2),
        }
        if confidence is None:
            return told
        high = self.high(confidence)
        return told | {
            "ttft_high_ms": round(high.ttft_ms, 1),
            "tpot_high_ms": round(high.tpot_ms, 2),
            "latency_high_ms": round(high.latency_ms, 1),
            "confidence": confidence,
            "output_tokens": round(self.length.expected, 1),
        }


def _joint(one: float, other: float) -> float:
    """One upper factor for two independent causes: their logs add as standard deviations do."""
    return math.exp(math.hypot(math.log(max(1.0, one)), math.log(max(1.0, other))))


@dataclass(slots=True, eq=False)
class Times:
    """The two times that a load or a build delays, for every level; ms."""

    ttft_ms: Floats
    latency_ms: Floats

    def delayed(self, ms: Floats | float) -> Times:
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
        cold: some `load_ms` is not 0.
        length: of the answer; the same at every level.
        margins: what `high` adds.
        causes: of one level, what its times were made of.
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
    cold: bool
    length: Length
    margins: MarginColumns
    causes: Callable[[int], tuple[FirstToken, Token]] | None = None

    def high(self, confidence: float) -> Predictions:
        """`Prediction.high` of every level."""
        ttft, tpot, latency = self.margins.factors(confidence)
        length, load_ms = self.length, self.load_ms
        own_ttft, own_latency = self.ttft_ms, self.latency_ms
        if self.cold:
            own_ttft, own_latency = own_ttft - load_ms, own_latency - load_ms
        more = length.upper(confidence) - length.expected
        if more:
            longer = own_latency + more * self.tpot_ms
            latency = _joints(latency, longer, own_latency)
        ttft_ms, latency_ms = own_ttft * ttft, own_latency * latency
        if self.cold:
            ttft_ms, latency_ms = load_ms + ttft_ms, load_ms + latency_ms
        return Predictions(  # not `replace`, which takes several times as long
            self.columns,
            self.idle_bytes,
            ttft_ms,
            self.tpot_ms * tpot,
            latency_ms,
            self.memory_mb,
            load_ms,
            self.build_ms,
            self.ttft_factor,
            self.tpot_factor,
            self.calm,
            self.cold,
            length,
            self.margins,
            self.causes,
        )

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
            length=self.length,
            margins=self.margins.rows[row],
            causes=partial(self.causes, row) if self.causes is not None else None,
        )


def _joints(one: Floats, longer: Floats, own: Floats) -> Floats:
    """`_joint` of every level, by the same arithmetic: the two must agree to the last bit."""
    return np.array(
        [
            _joint(first, more / mine) if mine > 0.0 else first
            for first, more, mine in zip(one.tolist(), longer.tolist(), own.tolist(), strict=True)
        ],
        dtype=np.float64,
    )
