"""Whether a running answer should go on at another level: pure, no clock, no I/O.

For policies that say `adaptive: true`. A sequence may change its level at a token boundary when its
promise is in danger (its tokens come slower than what is left of the budget allows) or when there
is slack enough for a better level. Only levels that are in memory, may be used under the policy and
keep the hard bounds (memory, quality) are looked at: those bounds hold for every token.

The recent pace of the answer itself is what the present level is judged by; others by the upper
quantile of their predicted time per token, at the policy's confidence. A change needs some tokens
since the last one and to the end, and there are few of them: each makes the steps of two levels
differ, and what is moved is not offered to others as a prefix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from gateway.policy.budget import Bounds, Budget
from gateway.policy.case import first
from gateway.policy.columns import Floats, Mask
from gateway.policy.decision import Ask
from gateway.policy.judge import Limits, Standing
from gateway.policy.objective import OBJECTIVES, Order, Prices
from gateway.policy.policy import Policy
from gateway.policy.prediction import Predictions
from gateway.variants.variant import LadderSnapshot

EVERY: Final = 8  # tokens between two looks, and at least to the end
MOST: Final = 6  # changes within one answer
_SLACK: Final = (
    0.6  # below this share of the pace that is allowed there is room for a better level …
)
_ROOM: Final = 0.8  # … whose tokens take no more than this share
_QUICKER: Final = 0.8  # a rescue that cannot keep the promise has to be so much quicker at least


@dataclass(frozen=True, slots=True)
class Going:
    """A running answer. Times in ms since the request came in.

    Attributes:
        level: where it runs.
        context: prompt and answer so far, tokens.
        done, left: tokens it has, and may still get.
        first_ms, now_ms: when its first token came, and now.
        pace_ms: per token lately.
        moves: how often it has changed its level.
    """

    level: str
    context: int
    done: int
    left: int
    first_ms: float
    now_ms: float
    pace_ms: float
    moves: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a running answer could have at every level now.

    Attributes:
        said: of a request with the answer's context and the tokens left, one per level.
        bearable_ms: the longest time per token that everybody else's promises bear.
    """

    ask: Ask
    policy: Policy
    snapshot: LadderSnapshot
    said: Predictions
    bearable_ms: float = math.inf

    def next_level(self, going: Going) -> str | None:
        """The level to go on at; None: where it is."""
        if self.ask.pinned_level is not None or going.left < EVERY or going.moves >= MOST:
            return None
        here = self.said.columns.index.get(going.level)
        if here is None:
            return None
        standing = Standing.of(self.said.columns, self.policy, self.snapshot.for_weights[0])
        budget, bounds = standing.budget(self.ask.sla)
        usable = self._usable(standing, bounds, here)
        allowed = allowed_ms(going, budget)
        high = self.said.high(self.policy.confidence).tpot_ms
        prices = Prices(self.said.columns, self.said.memory_mb, self.said.tpot_ms)
        objective = self.ask.sla.objective or self.policy.objective
        order = (*OBJECTIVES[objective](prices), standing.rank)
        if going.pace_ms > allowed:
            row = _rescue(usable, high, order, (allowed, going.pace_ms))
        elif objective == "quality" and going.pace_ms <= _SLACK * allowed:
            row = first(self._better(usable, here) & (high <= _ROOM * allowed), order)
        else:
            row = None
        return None if row is None else self.snapshot.levels[row].level

    def _usable(self, standing: Standing, bounds: Bounds, here: int) -> Mask:
        """Other levels in memory that keep the hard bounds."""
        hard = Limits(bounds, self.said).hard
        usable = standing.free & self.said.columns.ready
        if hard is not None:
            usable = usable & hard
        usable[here] = False
        return usable

    def _better(self, usable: Mask, here: int) -> Mask:
        """Those of better quality whose steps harm nobody else."""
        loss = self.said.columns.loss
        better: Mask = loss < loss[here]
        return usable & better & (self.said.tpot_ms <= self.bearable_ms)


def allowed_ms(going: Going, budget: Budget) -> float:
    """How long each token still to come may take for the bounds on times to be kept; inf without
    bounds, 0 or less when they are lost."""
    allowed = math.inf
    if budget.tpot_ms is not None:
        whole = budget.tpot_ms * (going.done + going.left - 1)
        allowed = (whole - (going.now_ms - going.first_ms)) / going.left
    if budget.latency_ms is not None:
        allowed = min(allowed, (budget.latency_ms - going.now_ms) / going.left)
    return allowed


def _rescue(usable: Mask, high: Floats, order: Order, paces: tuple[float, float]) -> int | None:
    """The best level that still keeps the promise, else one that is clearly quicker; none when the
    promise is lost already, for a worse answer would not save it. `paces`: allowed, and present."""
    allowed, present = paces
    keeps = usable & (high <= allowed) & (high < present)
    if keeps.any() or allowed <= 0.0:
        return first(keeps, order)
    return first(usable & (high < _QUICKER * present), (high, *order))
