"""What another budget would have got: for every level, and for every bound of the one chosen. Pure.

Nothing here is said that the real `decide` has not confirmed: each claim comes with a budget, and a
claim whose budget `decide` answers otherwise is left out.

Why the budgets are the least and the tightest there are: a level is served within its budget only
if every bound allows what the level costs. So no budget that relaxes less can get it; and where
this least budget gets another level, that one is better and costs no more, and every looser budget
would get it too, or one better still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from gateway.policy import phrases
from gateway.policy.budget import Budget, Costs
from gateway.policy.case import STEADY, Case
from gateway.policy.columns import Columns, needs_build
from gateway.policy.decide import decide
from gateway.policy.decision import Ask, Decision
from gateway.policy.policy import Policy

_TIMES: Final = ("ttft_ms", "tpot_ms", "latency_ms")
_NAMES: Final = tuple(Budget.model_fields)
_DIGITS: Final = (3, 6, 17)  # significant ones, until the rounded number does as well
_FIXED: Final = 6
_LEAST: Final = 1e-3  # a bound of 0 cannot be named
NO_FLOORS: Final[Mapping[str, float]] = MappingProxyType({})
_LOOSE_MS: Final = 3_600_000.0  # the loosest time that a request may name


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The least that the bounds in `budget` must give way for a level to be the choice.

    Attributes:
        bounds: those that change, as they have to be.
        budget: the whole budget then.
        policy: the request alone cannot do it: its policy sets one of the bounds.
    """

    bounds: Mapping[str, float]
    budget: Mapping[str, float]
    policy: bool


@dataclass(frozen=True, slots=True)
class Tighter:
    """What is decided when one bound is just too tight for the level chosen."""

    bound: str
    at: float
    decision: Decision


@dataclass(frozen=True, slots=True)
class Alternative:
    """One level that was not chosen.

    Attributes:
        relaxed: None when no looser budget makes it the choice.
        cheapest: the tightest bounds of a request that gets it under the same policy, all of them
            at once; None when none does.
    """

    level: str
    relaxed: Relaxed | None
    cheapest: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Counterfactuals:
    """`unpinned`: what is decided when no level is named; then the rest is empty."""

    levels: tuple[Alternative, ...] = ()
    tighter: tuple[Tighter, ...] = ()
    unpinned: Decision | None = None


def counterfactuals(
    case: Case, decision: Decision, floors: Mapping[str, float] = NO_FLOORS
) -> Counterfactuals:
    """Of a decision on `case`. Takes about half a millisecond per level.

    `floors`: the tightest times that this caller may ask for, by bound.
    """
    return _Probe(case, decision, floors).all()


class _Probe:
    """Decides one case again under other budgets, on columns of its own: those of the case may
    belong to another thread."""

    def __init__(self, case: Case, decision: Decision, floors: Mapping[str, float]) -> None:
        self._floors = floors
        self._ask, self._policy, self._snapshot = case.ask, case.policy, case.snapshot
        self._said = replace(case.said, columns=Columns(case.snapshot.levels))
        self._bounds = dict(case.bounds)
        self._decision = decision
        sla = self._ask.sla
        if not any(name in self._bounds for name in _TIMES):
            # Only with a bound on times are levels judged by what most answers keep.
            sla = sla.model_copy(update={"latency_ms": _LOOSE_MS})
        self._case = Case(replace(self._ask, sla=sla), self._policy, self._snapshot, self._said)

    def all(self) -> Counterfactuals:
        if self._ask.pinned_level is not None:
            free = replace(self._ask, pinned_level=None)
            return Counterfactuals(unpinned=self._decide(free, self._policy))
        chosen = self._decision.level or self._decision.build
        rows = range(len(self._snapshot.levels))
        others = [row for row in rows if self._snapshot.levels[row].level != chosen]
        return Counterfactuals(
            tuple(self._alternative(row) for row in others), tuple(self._tighter())
        )

    def _decide(self, ask: Ask, policy: Policy) -> Decision:
        return decide(ask, policy, self._snapshot, lambda *_: self._said)

    # -- other levels -----------------------------------------------------------------------------

    def _alternative(self, row: int) -> Alternative:
        level, have = self._snapshot.levels[row].level, self._costs(row)
        if have is None:
            return Alternative(level, None, None)
        return Alternative(level, self._relaxed(level, have), self._cheapest(level, have))

    def _costs(self, row: int) -> Costs | None:
        """What a budget has to allow for the level to be chosen; None when none helps."""
        case, facts = self._case, self._snapshot.levels[row]
        if case.barrier(row):
            return None
        if not needs_build(facts):
            return case.costs(row)
        if case.on_miss != "wait":
            return None  # served only once it is built
        return case.costs(row, warm=True, delay_ms=1000.0 * case.seconds(row))

    def _relaxed(self, level: str, have: Costs) -> Relaxed | None:
        for spare, digits in ((s, d) for s in (0.0, STEADY) for d in _DIGITS):
            bounds = {}
            for name, bound in self._bounds.items():
                needed = getattr(have, name) * (1.0 + spare * (name in _TIMES))
                if not _keeps(name, bound, needed):
                    bounds[name] = _outwards(name, bound, needed, digits)
            if not bounds or not all(map(_sayable, bounds, bounds.values())):
                continue
            ask, policy, by_policy = self._under(bounds)
            if _gets(self._decide(ask, policy), level):
                return Relaxed(bounds, self._bounds | bounds, by_policy)
        return None

    def _under(self, bounds: Mapping[str, float]) -> tuple[Ask, Policy, bool]:
        """The request, and its policy where it has to, with other bounds."""
        sla, policy = self._ask.sla, self._policy
        mine = {name: bound for name, bound in bounds.items() if getattr(sla, name) is not None}
        theirs = {}
        for name, bound in bounds.items():
            outer = getattr(policy, name)
            if outer is not None and not _keeps(name, outer, bound):
                theirs[name] = bound
        if theirs:
            policy = policy.model_copy(update=theirs)
        return replace(self._ask, sla=sla.model_copy(update=mine)), policy, bool(theirs)

    def _cheapest(self, level: str, have: Costs) -> Mapping[str, float] | None:
        for digits in _DIGITS:
            bounds = {n: _outwards(n, None, getattr(have, n), digits) for n in _NAMES}
            bounds |= {n: max(bounds[n], floor) for n, floor in self._floors.items()}
            if not all(map(_sayable, bounds, bounds.values())):
                return None
            ask = replace(self._ask, sla=self._ask.sla.model_copy(update=bounds))
            if _gets(self._decide(ask, self._policy), level):
                return bounds
        return None

    # -- the level chosen -------------------------------------------------------------------------

    def _tighter(self) -> Iterator[Tighter]:
        decision, columns = self._decision, self._said.columns
        row = columns.index.get(decision.level or "")
        if row is None or decision.misses:
            return
        have = self._case.costs(row)
        for name in _NAMES:
            at = _inwards(name, getattr(have, name))
            if not _sayable(name, at) or at < self._floors.get(name, 0.0):
                continue
            ask = replace(self._ask, sla=self._ask.sla.model_copy(update={name: at}))
            then = self._decide(ask, self._policy)
            if (then.level or then.build) != decision.level:
                yield Tighter(name, at, then)


def told(found: Counterfactuals, decision: Decision, case: Case) -> dict[str, Any]:
    """Counterfactuals as JSON, with their phrases."""
    policy = case.policy.name
    ratios = {f.level: f.card.perplexity_ratio for f in case.snapshot.levels}
    if found.unpinned is not None:
        return {
            "levels": [],
            "tighter": [],
            "unpinned": {
                "level": found.unpinned.level or found.unpinned.build,
                "action": found.unpinned.action,
                "sentence": phrases.unpinned(found.unpinned),
            },
        }
    return {
        "levels": [_told(one, dict(case.bounds), policy) for one in found.levels],
        "tighter": [
            {
                "bound": one.bound,
                "at": one.at,
                "level": one.decision.level or one.decision.build,
                "action": one.decision.action,
                "misses": list(one.decision.misses),
                "sentence": phrases.tighter(one.bound, one.at, one.decision, ratios),
            }
            for one in found.tighter
        ],
        "unpinned": None,
    }


def _told(one: Alternative, bounds: Mapping[str, float], policy: str) -> dict[str, Any]:
    relaxed, says = None, []
    if one.relaxed is not None:
        relaxed = {
            "bounds": dict(one.relaxed.bounds),
            "budget": dict(one.relaxed.budget),
            "needs_policy": one.relaxed.policy,
        }
        whose = policy if one.relaxed.policy else None
        says.append(phrases.relaxation(one.level, bounds, one.relaxed.bounds, whose))
    if one.cheapest is not None:
        says.append(phrases.cheapest(one.level, one.cheapest))
    return {
        "level": one.level,
        "relaxed": relaxed,
        "cheapest": None if one.cheapest is None else dict(one.cheapest),
        "sentences": says,
    }


def _gets(decision: Decision, level: str) -> bool:
    """Is the level what is served or waited for, within the budget?"""
    return (
        decision.action != "reject"
        and (decision.level or decision.build) == level
        and not decision.misses
    )


def _keeps(name: str, bound: float, value: float) -> bool:
    return value >= bound if name == "min_agreement" else value <= bound


def _sayable(name: str, bound: float) -> bool:
    """May a request name this bound?"""
    if not math.isfinite(bound):
        return False
    match name:
        case "max_ppl_ratio":
            return 1.0 <= bound <= 1e6
        case "min_agreement":
            return 0.0 <= bound <= 1.0
        case "memory_mb":
            return 0.0 < bound <= 1e9
        case _:
            return 0.0 < bound <= _LOOSE_MS


def _outwards(name: str, bound: float | None, value: float, digits: int) -> float:
    """A bound that allows `value`: `bound` and a round number more, or a round number itself."""
    if not math.isfinite(value):
        return value
    if name == "min_agreement":
        return value if digits > _FIXED else math.floor(value * 10**digits) / 10**digits
    if name == "max_ppl_ratio":
        return max(1.0, value if digits > _FIXED else math.ceil(value * 10**digits) / 10**digits)
    start = 0.0 if bound is None else bound
    found = round(start + _rounded(value - start, digits, math.ceil), 9)
    return found if found >= value > 0.0 else max(value, _LEAST)


def _inwards(name: str, value: float) -> float:
    """A bound that is just too tight for `value`."""
    if not math.isfinite(value):
        return value
    if name == "min_agreement":
        return math.floor(value * 1000.0 + 1.0) / 1000.0
    if name == "max_ppl_ratio":
        return math.ceil(value * 1000.0 - 1.0) / 1000.0
    at = _rounded(value, 3, math.floor)
    return at if at < value else _rounded(value * 0.999, 3, math.floor)


def _rounded(value: float, digits: int, how: Any) -> float:
    """To so many significant digits, in one direction; beyond `_FIXED` of them not at all."""
    if abs(value) < _LEAST**3 or digits > _FIXED:
        return value
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(abs(value))))
    return float(how(value * scale)) / scale
