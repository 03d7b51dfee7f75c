"""What deciders may know of one model's levels, described anew only where something changed.

It is asked on every request, so it compares cheaply and describes little. A level that stayed as it
was keeps its `LevelFacts` object, which tells a decider at once that there is nothing new about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, count
from operator import is_not

from gateway.engine.base import EngineStats
from gateway.variants.card import Card
from gateway.variants.entry import IDLE_STATS, Variant
from gateway.variants.variant import LevelFacts, State


class Ladder:
    """The levels of one model, as they were when they were last looked at.

    Attributes:
        facts: every level, best quality first.
        building: how many are being built.
        running, waiting_prompt_tokens: sums over the levels.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        self._variants = variants
        self._known: list[LevelFacts] = []  # in the order of `variants`
        self._cards: list[Card] = []
        self._states: list[State] = []
        self._leases: list[int] = []
        self._pins: list[bool] = []
        self._errors: list[str | None] = []
        self._stats = [IDLE_STATS] * len(variants)
        self._order: list[int] = []
        self.facts: tuple[LevelFacts, ...] = ()
        self.building = self.running = self.waiting_prompt_tokens = 0

    def look(self, now: float, *, closely: bool) -> None:
        """See what changed; `now` is the pool's clock.

        Not `closely`: of a level without work, the engine's counters may be those of an earlier
        look.
        """
        variants = self._variants
        cards = [variant.backend.card(variant.spec.level) for variant in variants]
        states = [variant.state for variant in variants]
        leases = [variant.leases for variant in variants]
        pins = [variant.pinned for variant in variants]
        errors = [variant.error for variant in variants]
        if closely or not self._known:
            changed = set(range(len(variants)))
            self._look_at_engines()
        else:
            changed = self._look_at_engines()
            for old, new in (
                (self._cards, cards),
                (self._states, states),
                (self._leases, leases),
                (self._pins, pins),
                (self._errors, errors),
            ):
                if old != new:
                    changed.update(compress(count(), map(is_not, old, new)))
            if State.FAILED in states:  # the time until it may be tried again goes by
                changed.update(row for row, state in enumerate(states) if state is State.FAILED)
        if changed:
            self._describe(changed, cards, now)
            self._cards, self._states, self._leases, self._errors = cards, states, leases, errors
            self._pins = pins
            self.building = states.count(State.BUILDING)

    def _look_at_engines(self) -> set[int]:
        """Read what engines do; the rows where it matters that it changed."""
        changed = set()
        running = tokens = 0
        for row, variant in enumerate(self._variants):
            engine, old = variant.engine, self._stats[row]
            if engine is None:
                if old is not IDLE_STATS:
                    self._stats[row] = IDLE_STATS
                    changed.add(row)
                continue
            stats = engine.stats()
            running += stats.running
            tokens += stats.waiting_prompt_tokens
            if stats is not old:
                self._stats[row] = stats
                if _works(stats) or _works(old):
                    changed.add(row)
        self.running, self.waiting_prompt_tokens = running, tokens
        return changed

    def _describe(self, rows: set[int], cards: list[Card], now: float) -> None:
        variants = self._variants
        if len(rows) == len(variants):
            self._known = [v.facts(now, s) for v, s in zip(variants, self._stats, strict=True)]
        else:
            for row in rows:
                self._known[row] = variants[row].facts(now, self._stats[row])
        if cards != self._cards or not self._order:
            worst = [(card.loss, -card.resident_bytes) for card in cards]
            self._order = sorted(range(len(cards)), key=worst.__getitem__)
        known = self._known
        self.facts = tuple([known[row] for row in self._order])


def _works(stats: EngineStats) -> bool:
    return bool(stats.running or stats.waiting or stats.waiting_prompt_tokens)
