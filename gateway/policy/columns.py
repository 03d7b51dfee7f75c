"""A ladder as arrays: one per fact, one entry per level, so that a request is judged against all
levels with a few array operations. Pure data; knows no policy and predicts nothing.

Only what seldom changes is here (cards, states): whoever follows a ladder keeps one `Columns` as
long as `still` says so. What the engines do now is not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.variants.card import Card
from gateway.variants.variant import LevelFacts, State

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Codes = NDArray[np.int8]
Rows = NDArray[np.intp]

UNKNOWN_BUILD_SECONDS: Final = 60.0  # for a card that does not say


def loss(card: Card) -> float:
    """`Card.loss` in steps of 0.1 %: closer levels cannot be told apart by the texts at hand, and
    noise must not send everybody to a slower level."""
    exact = card.loss
    return exact if math.isinf(exact) else round(exact, 3)


def needs_build(facts: LevelFacts) -> bool:
    return facts.state in (State.ABSENT, State.BUILDING)


class Columns:
    """The facts of every level, in ladder order. Its arrays are never written to.

    Attributes:
        resident, kv: bytes of weights, and of KV cache per token.
        ratio, agreement: perplexity ratio and top-1 agreement.
        loss: see `loss`.
        token_ms: ms per token at the best batch size, for throughput; inf when unknown.
        prefill_ms: of one prompt token; 0 when unknown.
        prepare_s: expected seconds until the level is in memory: builds before it, its build, its
            load.
        ready_rows, ready_bytes: the rows of ready levels, and what these keep resident in all.
        ready, draining, loadable, unbuilt, in_memory: by state; `unbuilt` ones need a build.
        unready: anything but ready.
        none: no level.
    """

    def __init__(self, levels: tuple[LevelFacts, ...]) -> None:
        self.levels = levels
        self.index = {facts.level: row for row, facts in enumerate(levels)}
        cards = [facts.card for facts in levels]
        self.resident = floats(card.resident_bytes for card in cards)
        self.kv = floats(facts.kv_bytes_per_token for facts in levels)
        self.ratio = floats(card.perplexity_ratio for card in cards)
        self.agreement = floats(card.top1_agreement for card in cards)
        self.loss = floats(loss(card) for card in cards)
        self.token_ms = floats(_token_ms(card) for card in cards)
        self.prefill_ms = floats(_prefill_ms(card) for card in cards)
        self.prepare_s = floats(_prepare_seconds(levels))
        self.ready = self._in(State.READY)
        self.ready_rows = self.ready.nonzero()[0].tolist()
        self.ready_bytes = sum(cards[row].resident_bytes for row in self.ready_rows)
        self.unready = ~self.ready
        self.draining = self._in(State.DRAINING)
        self.loadable = self._in(State.READY, State.LOADING, State.STORED)
        self.unbuilt = self._in(State.ABSENT, State.BUILDING)
        self.any_unbuilt = bool(self.unbuilt.any())
        self.in_memory = self._in(State.READY, State.LOADING, State.DRAINING)
        self.none = np.zeros(len(levels), dtype=np.bool_)
        self.memo: dict[object, object] = {}  # what is derived from these columns and one policy
        self.keeping: dict[tuple[str, float], Mask] = {}  # who keeps a bound that cards tell about

    def __len__(self) -> int:
        return len(self.levels)

    def still(self, levels: tuple[LevelFacts, ...], changed: Iterable[int]) -> bool:
        """Do these columns hold for `levels` too, if only the rows `changed` are other objects?"""
        return all(_alike(self.levels[row], levels[row]) for row in changed)

    @cached_property
    def settled(self) -> Columns:
        """The same ladder when every level being unloaded is unloaded."""
        if not self.draining.any():
            return self
        levels = (
            replace(facts, state=State.STORED) if facts.state is State.DRAINING else facts
            for facts in self.levels
        )
        return Columns(tuple(levels))

    def _in(self, *states: State) -> Mask:
        return np.array([facts.state in states for facts in self.levels], dtype=np.bool_)


def floats(values: Iterable[float]) -> Floats:
    """A column of what may be whole numbers; bytes stay exact up to 2^53."""
    return np.array([float(value) for value in values], dtype=np.float64)


def _alike(one: LevelFacts, other: LevelFacts) -> bool:
    return (
        one.state is other.state
        and one.level == other.level
        and one.kv_bytes_per_token == other.kv_bytes_per_token
        and one.max_running == other.max_running
        and (one.card is other.card or one.card == other.card)
    )


def _token_ms(card: Card) -> float:
    rate = max((rate for rate in card.decode_tokens_per_s.values() if rate > 0), default=0.0)
    return 1000.0 / rate if rate else math.inf


def _prefill_ms(card: Card) -> float:
    rate = card.prefill_tokens_per_s
    return 1000.0 / rate if rate > 0 else 0.0


def _prepare_seconds(levels: tuple[LevelFacts, ...]) -> Iterator[float]:
    queue = sum(_build_seconds(f.card) for f in levels if f.state is State.BUILDING)
    for facts in levels:
        if facts.state is State.READY:
            yield 0.0
            continue
        seconds = facts.card.load_seconds
        if needs_build(facts):
            seconds += _build_seconds(facts.card)
        if facts.state is State.ABSENT:
            seconds += queue
        yield seconds


def _build_seconds(card: Card) -> float:
    return card.build_seconds if card.build_seconds > 0 else UNKNOWN_BUILD_SECONDS
