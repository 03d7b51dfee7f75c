"""Judges every level of a ladder against a policy and the bounds of one request. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, cast

import numpy as np

from gateway.policy.budget import HARD, Bounds, Budget, Costs
from gateway.policy.columns import Codes, Columns, Floats, Mask, Rows
from gateway.policy.moment import Moment
from gateway.policy.policy import Policy
from gateway.policy.prediction import Prediction, Predictions, Times, Upper
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

# Why a level cannot be used whatever it costs.
BARRIERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "levels": "not among the policy's levels",
        "failed": "failed",
        "draining": "being unloaded",
        "too_large": "larger than the memory for weights on this host",
        "host_memory": "no room beside the levels in use",
        "not_built": "not built, and the policy may not build it",
        "promises": "too much for the promises of running requests",
    }
)
PASSING: Final = frozenset({"draining", "host_memory", "promises"})  # barriers that time removes
_NAMES: Final = ("", *BARRIERS)
_CODES: Final = MappingProxyType({name: code for code, name in enumerate(_NAMES)})
_MEMO: Final = 64  # policies whose standing is kept per ladder


def costs(facts: LevelFacts, predicted: Prediction) -> Costs:
    """Every cost that a budget can bound, for one request at one level."""
    return Costs(
        ttft_ms=predicted.ttft_ms,
        tpot_ms=predicted.tpot_ms,
        latency_ms=predicted.latency_ms,
        memory_mb=predicted.memory_mb,
        max_ppl_ratio=facts.card.perplexity_ratio,
        min_agreement=facts.card.top1_agreement,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """A ladder under one policy, as long as neither changes.

    Attributes:
        barrier: code of what bars each level, room beside the levels in use left out; 0: nothing.
        free: nothing bars it.
        cramped: some free level is not in memory, so that it matters whether there is room.
        prospects: some free level is not ready, so that one may be worth preparing.
        rank: the policy's order of preference.
    """

    policy: Policy
    barrier: Codes
    free: Mask
    cramped: bool
    prospects: bool
    rank: Floats
    _outer: Budget
    _budgets: dict[Bounds, tuple[Budget, Bounds]]

    @classmethod
    def of(cls, columns: Columns, policy: Policy, weight_budget: int) -> Standing:
        """From the columns' memo; policies are told apart by identity, which is quick and safe:
        the memo keeps them alive."""
        key = (id(policy), weight_budget)
        known = columns.memo.get(key)
        if known is None:
            if len(columns.memo) >= _MEMO:
                columns.memo.clear()
            barrier = _barriers(columns, policy, weight_budget)
            ranks = {level: rank for rank, level in enumerate(policy.levels)}
            rank = np.array(
                [
                    ranks.get(facts.level, len(ranks) + row)
                    for row, facts in enumerate(columns.levels)
                ],
                dtype=np.float64,
            )
            free = barrier == 0
            cramped = bool((free & ~columns.in_memory).any())
            prospects = bool((free & columns.unready).any())
            known = cls(policy, barrier, free, cramped, prospects, rank, policy.budget, {})
            columns.memo[key] = known
        return cast(Standing, known)

    def budget(self, asked: Budget) -> tuple[Budget, Bounds]:
        """The effective budget of a request and its bounds. Requests of one kind ask alike, so the
        last few are kept."""
        key = asked.bounds()
        known = self._budgets.get(key)
        if known is None:
            if len(self._budgets) >= _MEMO:
                self._budgets.clear()
            budget = asked.intersect(self._outer)
            known = self._budgets[key] = (budget, budget.bounds())
        return known

    def name(self, row: int) -> str:
        """The barrier of a level by name; "": none but perhaps room beside the levels in use."""
        return _NAMES[self.barrier.item(row)]


def _barriers(columns: Columns, policy: Policy, weight_budget: int) -> Codes:
    levels = columns.levels
    listed = [not policy.levels or facts.level in policy.levels for facts in levels]
    absent = [facts.state is State.ABSENT and not policy.build for facts in levels]
    failed = [facts.state is State.FAILED for facts in levels]
    return np.select(
        [
            ~np.array(listed, dtype=np.bool_),
            ~columns.in_memory & (columns.resident > weight_budget),
            np.array(failed, dtype=np.bool_),
            columns.draining,
            np.array(absent, dtype=np.bool_),
        ],
        [_CODES[name] for name in ("levels", "too_large", "failed", "draining", "not_built")],
        0,
    ).astype(np.int8)


def roomy(said: Predictions, snapshot: LadderSnapshot) -> Mask:
    """The levels for which there is room beside those in use; in memory, their bytes count as used
    already.

    Only idle levels of this ladder count as unloadable. Whatever else is taken stays taken: levels
    in use, levels on their way in or out, and everything of other models, whose leases a snapshot
    does not tell (the pool may find more room than this, hardly less).
    """
    budget, used = snapshot.for_weights
    room = max(0, budget - max(0, used - said.idle_bytes))
    return said.columns.in_memory | (said.columns.resident <= room)


def harmless(judged: Predictions | Upper, moment: Moment, prompt_tokens: int) -> Mask | None:
    """The levels at which one more sequence breaks no promise of those that run; None: all.

    Levels take turns on the same cores, so the newcomer's time per token is everybody's, and its
    prompt holds everybody up.
    """
    mask = None
    if moment.token_ms < np.inf:
        mask = judged.tpot_ms <= moment.token_ms
    if moment.slack_ms < np.inf:
        calm = judged.columns.prefill_ms * prompt_tokens <= moment.slack_ms
        mask = calm if mask is None else mask & calm
    return mask


class Limits:
    """The bounds of one request over all levels; `said`: the predictions they are judged by.

    Attributes:
        hard: the levels that keep the hard bounds (memory, quality); None when there are none.
    """

    __slots__ = ("_bounds", "_paced", "_said", "_timed", "hard")

    def __init__(self, bounds: Bounds, said: Predictions | Upper) -> None:
        self._bounds = bounds
        self._said = said
        self._timed: list[tuple[str, float]] = []
        self.hard: Mask | None = None
        self._paced: Mask | None = None  # the levels that keep what no load or build delays
        for name, bound in bounds:
            if name in HARD:
                kept = _certain(name, bound, said)
                self.hard = kept if self.hard is None else self.hard & kept
            elif name == "tpot_ms":
                self._paced = said.tpot_ms <= bound
            else:
                self._timed.append((name, bound))
        if self.hard is not None:
            self._paced = self.hard if self._paced is None else self.hard & self._paced

    def kept(self, mask: Mask, times: Times) -> Mask:
        """Those of `mask` that keep every bound."""
        if self._paced is not None:
            mask = mask & self._paced
        for name, bound in self._timed:
            mask = mask & (self._time(name, times) <= bound)
        return mask

    def broken(self, rows: Rows, times: Times) -> tuple[Floats, Floats]:
        """(how many bounds are broken, by how much in all) for some levels; see `budget.excess`."""
        count, total = np.zeros(len(rows)), np.zeros(len(rows))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            for name, bound in self._bounds:
                value = self._value(name, times)[rows]
                over = bound - value if name == "min_agreement" else value - bound
                beyond = ~(over <= 0)
                if beyond.any():
                    count += beyond
                    share = np.where(over < np.inf, over / bound, np.inf)
                    total += np.where(beyond, share, 0.0)
        return count, total

    def _value(self, name: str, times: Times) -> Floats:
        return self._fixed(name) if name in HARD else self._time(name, times)

    def _time(self, name: str, times: Times) -> Floats:
        match name:
            case "ttft_ms":
                return times.ttft_ms
            case "latency_ms":
                return times.latency_ms
            case _:
                return self._said.tpot_ms

    def _fixed(self, name: str) -> Floats:
        match name:
            case "memory_mb":
                return self._said.memory_mb
            case "max_ppl_ratio":
                return self._said.columns.ratio
            case _:
                return self._said.columns.agreement


def _certain(name: str, bound: float, said: Predictions | Upper) -> Mask:
    """The levels that keep a hard bound; what only cards tell is kept with their columns."""
    if name == "memory_mb":
        return said.memory_mb <= bound
    columns = said.columns
    known = columns.keeping.get((name, bound))
    if known is None:
        if len(columns.keeping) >= _MEMO:
            columns.keeping.clear()
        agreed = name == "min_agreement"
        known = columns.agreement >= bound if agreed else columns.ratio <= bound
        columns.keeping[name, bound] = known  # NaN keeps no bound
    return known
