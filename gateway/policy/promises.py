"""What running requests were promised, and what that leaves for newcomers. Pure: no clock.

Whoever runs a request makes its promise known and takes it back at its end; the facts are gathered
anew at most every 10 ms, however many decisions ask for them. Owned by the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_FRESH_S: Final = 0.01
# A promise that needs its tokens so much faster than they come is lost; sparing it would help
# nobody and keep everybody else out.
_LOST: Final = 0.8

Progress = Callable[[], tuple[int, float | None]]
"""(tokens of the slowest sequence, when its first came; None: not yet). Seconds of one clock."""


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """The time bounds that one running request is to keep; `tokens` at most, per sequence, one
    every `pace_ms` as predicted."""

    level: str
    arrived: float
    tokens: int
    pace_ms: float
    tpot_ms: float | None
    latency_ms: float | None
    progress: Progress


@dataclass(frozen=True, slots=True)
class Bearable:
    """What the promises of one level, or of all, bear: see `Moment`."""

    token_ms: float = math.inf
    slack_ms: float = math.inf

    def and_(self, other: Bearable) -> Bearable:
        return Bearable(min(self.token_ms, other.token_ms), min(self.slack_ms, other.slack_ms))


ANYTHING: Final = Bearable()


class Promises:
    """The live promises of one model's levels."""

    def __init__(self) -> None:
        self._live: set[Promise] = set()
        self._all = ANYTHING
        self._at = -math.inf

    def __len__(self) -> int:
        return len(self._live)

    def begin(self, promise: Promise) -> None:
        self._live.add(promise)
        self._at = -math.inf

    def end(self, promise: Promise) -> None:
        self._live.discard(promise)
        if not self._live:
            self._all = ANYTHING

    def bearable(self, now: float) -> Bearable:
        """What every promise of the model bears; not older than 10 ms."""
        if self._live and now - self._at >= _FRESH_S:
            self._all, self._at = ANYTHING, now
            for promise in self._live:
                self._all = self._all.and_(bears(promise, now))
        return self._all

    def by_level(self, now: float) -> dict[str, Bearable]:
        """The same for every level that has promises."""
        found: dict[str, Bearable] = {}
        for promise in self._live:
            found[promise.level] = found.get(promise.level, ANYTHING).and_(bears(promise, now))
        return found


def bears(promise: Promise, now: float) -> Bearable:
    """How slow tokens may become, and how long everything may stand still, without breaking it.

    A promise that cannot be kept any more bears anything.
    """
    done, first = promise.progress()
    left = promise.tokens - done
    if left <= 0:
        return ANYTHING
    pace = promise.pace_ms
    if first is not None and done > 1:
        pace = 1000.0 * (now - first) / (done - 1)
    found = ANYTHING
    if promise.tpot_ms is not None:
        # The promise holds for the mean over the tokens so far, wherever the answer ends.
        lost_ms = 0.0 if first is None else 1000.0 * (now - first) - promise.tpot_ms * (done - 1)
        bearable = _within(promise.tpot_ms * left - max(0.0, lost_ms), left, pace)
        found = found.and_(Bearable(min(promise.tpot_ms, bearable.token_ms), bearable.slack_ms))
        if bearable is ANYTHING:
            found = ANYTHING
    if promise.latency_ms is not None:
        over = promise.latency_ms - 1000.0 * (now - promise.arrived)
        found = found.and_(_within(over, left, pace))
    return found


def _within(time_ms: float, tokens: int, pace_ms: float) -> Bearable:
    """`tokens` in `time_ms`, when they came one every `pace_ms` so far."""
    token_ms = time_ms / tokens
    if token_ms <= 0.0 or token_ms < _LOST * pace_ms:
        return ANYTHING
    return Bearable(token_ms, time_ms - tokens * min(pace_ms, token_ms))
