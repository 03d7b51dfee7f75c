"""What a request would cost: at one level as numbers, at every level as arrays. Pure data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, overload

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


class Timed(Protocol):
    """The two times that a load or a build delays, for every level; ms."""

    @property
    def ttft_ms(self) -> Floats: ...
    @property
    def latency_ms(self) -> Floats: ...


class Times:
    """Times `more` ms later and `less` ms earlier than `source` says; worked out when asked for."""

    __slots__ = ("_latency_ms", "_less", "_more", "_source", "_ttft_ms")

    def __init__(
        self, source: Timed, less: Floats | None = None, more: Floats | float | None = None
    ) -> None:
        self._source = source
        self._less = less
        self._more = more
        self._ttft_ms: Floats | None = None
        self._latency_ms: Floats | None = None

    @property
    def ttft_ms(self) -> Floats:
        if self._ttft_ms is None:
            self._ttft_ms = self._moved(self._source.ttft_ms)
        return self._ttft_ms

    @property
    def latency_ms(self) -> Floats:
        if self._latency_ms is None:
            self._latency_ms = self._moved(self._source.latency_ms)
        return self._latency_ms

    def delayed(self, ms: Floats | float) -> Times:
        return Times(self, None, ms)

    def _moved(self, time_ms: Floats) -> Floats:
        if self._less is not None:
            time_ms = time_ms - self._less
        return time_ms if self._more is None else time_ms + self._more


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

    def high(self, confidence: float) -> Upper:
        """`Prediction.high` of every level."""
        return Upper(self, confidence)

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


class Upper:
    """`Prediction.high` of every level, at one confidence. Never written to; a column is worked out
    when it is first asked for, since most requests bound only some times."""

    __slots__ = ("_confidence", "_factors", "_latency_ms", "_said", "_tpot_ms", "_ttft_ms")

    def __init__(self, said: Predictions, confidence: float) -> None:
        self._said = said
        self._confidence = confidence
        self._factors = said.margins.factors(confidence)
        self._ttft_ms: Floats | None = None
        self._tpot_ms: Floats | None = None
        self._latency_ms: Floats | None = None

    @property
    def columns(self) -> Columns:
        return self._said.columns

    @property
    def memory_mb(self) -> Floats:
        return self._said.memory_mb

    @property
    def ttft_ms(self) -> Floats:
        if self._ttft_ms is None:
            said, factor = self._said, self._factors[0]
            if said.cold:
                self._ttft_ms = said.load_ms + (said.ttft_ms - said.load_ms) * factor
            else:
                self._ttft_ms = said.ttft_ms * factor
        return self._ttft_ms

    @property
    def tpot_ms(self) -> Floats:
        if self._tpot_ms is None:
            self._tpot_ms = self._said.tpot_ms * self._factors[1]
        return self._tpot_ms

    @property
    def latency_ms(self) -> Floats:
        if self._latency_ms is None:
            said, factor = self._said, self._factors[2]
            own = said.latency_ms - said.load_ms if said.cold else said.latency_ms
            more = said.length.upper(self._confidence) - said.length.expected
            if more:
                factor = _joints(factor, own + more * said.tpot_ms, own)
            self._latency_ms = said.load_ms + own * factor if said.cold else own * factor
        return self._latency_ms

    def __getitem__(self, row: int) -> Prediction:
        return self._said[row].high(self._confidence)


def _joints(one: Floats, longer: Floats, own: Floats) -> Floats:
    """`_joint` of every level, by the same arithmetic: the two must agree to the last bit."""
    return np.array(
        [
            _joint(first, more / mine) if mine > 0.0 else first
            for first, more, mine in zip(one.tolist(), longer.tolist(), own.tolist(), strict=True)
        ],
        dtype=np.float64,
    )
