"""How far measurements stray from predictions: calibrated upper quantiles, learned as they come.

Of every level and time the last log ratios (measured ÷ predicted) are kept. Their empirical
quantiles are corrected by adaptive conformal inference (Gibbs & Candès, NeurIPS 2021): each miss
moves the quantile that is read outwards, each hit inwards, so that in the long run the promised
share is kept whatever the errors look like and however the machine drifts. Levels with few answers
borrow the quantiles of all levels together. Bounded state; no clock, no I/O.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gateway.policy.columns import Floats

KINDS: Final = ("ttft", "tpot", "latency")
# Shares of answers that are to keep a bound; between two of them, the log ratio is interpolated.
GRID: Final = (0.5, 0.75, 0.9, 0.95, 0.99)

_WINDOW: Final = 256  # log ratios kept per level and time
_POOLED: Final = 1024  # and of all levels together
_OWN: Final = 64  # answers after which a level's quantiles are its own
_GUESS: Final = 0.25  # standard deviation of the log ratio before anything was measured
_NORMAL: Final = (0.0, 0.674, 1.282, 1.645, 2.326)  # quantiles of the normal distribution at GRID
_PACE: Final = 0.02  # how much of its share a miss moves the quantile that is read
_MOST: Final = math.log(1e6)  # a log ratio beyond this is one of this


class Scores:
    """The last log ratios of one time at one level (or at all), and their quantiles at `GRID`."""

    __slots__ = ("_reads", "_recent", "_size", "_sorted", "count", "quantiles")

    def __init__(self, size: int = _WINDOW) -> None:
        self._size = size
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._reads = list(GRID)  # the shares to read so that GRID is kept
        self.count = 0
        self.quantiles = [_GUESS * normal for normal in _NORMAL]

    def learn(self, score: float, said: Sequence[float]) -> None:
        """One more log ratio; `said`: the quantiles that had been promised for it."""
        score = min(_MOST, max(-_MOST, score))
        for index, share in enumerate(GRID):
            step = _PACE * (share - (score <= said[index]))
            self._reads[index] = min(1.0, max(0.0, self._reads[index] + step))
        self._recent.append(score)
        insort(self._sorted, score)
        if len(self._recent) > self._size:
            oldest = self._recent.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self.count += 1
        self.quantiles = self._read()

    def ratio(self, share: float) -> float:
        """The plain empirical quantile of the ratios in the window."""
        return math.exp(_nearest(self._sorted, share * len(self._sorted)))

    def _read(self) -> list[float]:
        """Non-decreasing; with few scores mixed with the guess."""
        own = min(1.0, self.count / _OWN)
        found, least = [], -_MOST
        for share, normal in zip(self._reads, _NORMAL, strict=True):
            # One rank further than the plain quantile: the score to come is one of n + 1.
            read = _nearest(self._sorted, share * (len(self._sorted) + 1))
            least = max(least, own * read + (1.0 - own) * _GUESS * normal)
            found.append(least)
        return found


def _nearest(ordered: Sequence[float], rank: float) -> float:
    return ordered[min(len(ordered), max(1, math.ceil(rank))) - 1]


class Spread:
    """The scores of one level, by time."""

    __slots__ = ("scores",)

    def __init__(self, size: int = _WINDOW) -> None:
        self.scores = tuple(Scores(size) for _ in KINDS)

    def margins(self, pooled: Spread) -> Margins:
        """What to promise: the level's own quantiles as far as it has answers, else everybody's."""
        return Margins(
            tuple(
                _promise(own, every) for own, every in zip(self.scores, pooled.scores, strict=True)
            )
        )


def pooled_spread() -> Spread:
    """The scores of all levels together."""
    return Spread(_POOLED)


def _promise(own: Scores, pooled: Scores) -> tuple[float, ...]:
    share = min(1.0, own.count / _OWN)
    pairs = zip(own.quantiles, pooled.quantiles, strict=True)
    return tuple(share * mine + (1.0 - share) * theirs for mine, theirs in pairs)


@dataclass(frozen=True, slots=True)
class Margins:
    """Log ratios promised at one level: by time (`KINDS`), at every share of `GRID`."""

    logs: tuple[tuple[float, ...], ...] = ((0.0,) * len(GRID),) * len(KINDS)

    def factor(self, kind: int, share: float) -> float:
        """What to multiply a prediction with to get a bound kept by `share` of answers; at least 1,
        for less than what is expected is never promised."""
        return self.factor_at(kind, *place(share))

    def factor_at(self, kind: int, below: int, weight: float) -> float:
        """`factor` at a `place`."""
        logs = self.logs[kind]
        log = (1.0 - weight) * logs[below] + weight * logs[below + 1]
        return math.exp(max(0.0, log))


class MarginColumns:
    """`Margins` of every level of a ladder, as arrays. Never written to."""

    def __init__(self, rows: Sequence[Margins]) -> None:
        self.rows = tuple(rows)
        self._known: dict[float, tuple[Floats, Floats, Floats]] = {}

    def replaced(self, row: int, margins: Margins) -> MarginColumns:
        """The same with other margins for one level."""
        rows = list(self.rows)
        rows[row] = margins
        other = MarginColumns(rows)
        for share, factors in self._known.items():
            copied = (factors[0].copy(), factors[1].copy(), factors[2].copy())
            for kind, column in enumerate(copied):
                column[row] = margins.factor(kind, share)
            other._known[share] = copied
        return other

    def factors(self, share: float) -> tuple[Floats, Floats, Floats]:
        """`Margins.factor` of every level, for each of `KINDS`."""
        known = self._known.get(share)
        if known is None:
            if len(self._known) >= len(GRID):
                self._known.clear()
            below, weight = place(share)
            ttft, tpot, latency = (
                np.array(
                    [row.factor_at(kind, below, weight) for row in self.rows], dtype=np.float64
                )
                for kind in range(len(KINDS))
            )
            known = self._known[share] = (ttft, tpot, latency)
        return known


def place(share: float) -> tuple[int, float]:
    """(index of the point of `GRID` below `share`, weight of the one above it)."""
    below = min(len(GRID) - 2, max(0, bisect_right(GRID, share) - 1))
    low, high = GRID[below], GRID[below + 1]
    # Tails are about exponential: the log ratio is linear in the log of the share beyond.
    beyond = math.log((1.0 - low) / max(1e-9, 1.0 - share)) / math.log((1.0 - low) / (1.0 - high))
    return below, min(1.0, max(0.0, beyond))
