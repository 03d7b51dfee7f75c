"""One request with every level's numbers: the verbs that the decision tree is written in. Pure.

Levels are rows of the ladder here; `option` makes a row into the noun that sentences are about.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Final

import numpy as np

from gateway.policy import sentences
from gateway.policy.budget import HARD, Costs, excess
from gateway.policy.columns import Mask, Rows, needs_build
from gateway.policy.decision import Action, Ask, Code, Decision, Verdict
from gateway.policy.judge import Limits, Standing, costs, harmless, roomy
from gateway.policy.objective import OBJECTIVES, Key, Option, Order, Prices, gain
from gateway.policy.policy import Policy
from gateway.policy.prediction import Prediction, Predictions, Times
from gateway.variants.variant import LadderSnapshot, State

STEADY: Final = 0.1  # a level must be better by this share to take a kind of request from another
_TIMES: Final = frozenset({"ttft_ms", "tpot_ms", "latency_ms"})


class Case:
    """One request under one policy on one ladder, every level judged.

    Loading counts in a level's times, building does not: an absent level is judged as it will be
    once it is in memory.

    Attributes:
        expected: requests that a build or a load has to pay for.
        judged: upper predictions of times, which bounds are judged by.
        open: no barrier stands before the level.
        fits: open, and every bound is kept.
        usable: fits without a build.
        later: not in memory yet, and fits once it is.
        times, order: expected, of using a level now, and by what the best is found; `warm_…`: the
            same once it is in memory.
        late, late_warm: the times that bounds are judged by, from the request's arrival on.
    """

    def __init__(
        self, ask: Ask, policy: Policy, snapshot: LadderSnapshot, said: Predictions
    ) -> None:
        self.ask = ask
        self.policy = policy
        self.snapshot = snapshot
        self.said = said
        self.columns = columns = said.columns
        self.standing = Standing.of(columns, policy, snapshot.for_weights[0])
        self.budget, self.bounds = self.standing.budget(ask.sla)
        self.objective = ask.sla.objective or policy.objective
        self.on_miss = ask.sla.on_miss or policy.on_miss
        moment = ask.moment
        self.expected = policy.expected_requests if moment.expected is None else moment.expected
        timed = moment.token_ms < math.inf or not _TIMES.isdisjoint(dict(self.bounds))
        self.judged = said.high(policy.confidence) if timed else said
        self.open = self.standing.free
        if self.standing.cramped:
            self.open = self.open & self.roomy
        self.harmless = harmless(self.judged, moment, ask.prompt_tokens)
        if self.harmless is not None:
            self.open = self.open & self.harmless
        self.limits = Limits(self.bounds, self.judged)
        less = said.build_ms if columns.any_unbuilt else None
        self.times = Times(said, less)
        self.late = Times(self.judged, less, moment.waited_ms or None)
        self.fits = self.limits.kept(self.open, self.late)
        self.usable = self.fits & columns.loadable

    # -- what only some decisions ask for ---------------------------------------------------------

    @cached_property
    def roomy(self) -> Mask:
        return roomy(self.said, self.snapshot)

    @cached_property
    def warm_times(self) -> Times:
        return Times(self.said, self.said.load_ms)

    @cached_property
    def late_warm(self) -> Times:
        return Times(self.judged, self.said.load_ms, self.ask.moment.waited_ms or None)

    @cached_property
    def later(self) -> Mask:
        if not self.standing.prospects:
            return self.columns.none
        mask = self.open & self.columns.unready
        return self.limits.kept(mask, self.late_warm) if mask.any() else mask

    @cached_property
    def order(self) -> Order:
        return self._order(self.times)

    @cached_property
    def warm_order(self) -> Order:
        return self._order(self.warm_times)

    # -- choosing ---------------------------------------------------------------------------------

    def steady(self, best: int) -> int:
        """`best`, or a usable level that serving it instead would be restless of.

        A kind of request stays at the level that it got a moment ago until another is better by
        more than noise; and what is in memory serves while another level has just been loaded.
        """
        moment = self.ask.moment
        if moment.recent is not None:
            row = self.columns.index.get(moment.recent)
            if row is not None and row != best and self.usable[row] and self._close(row, best):
                best = row
        if moment.settling and self.displaces(best):
            resident = first(self.usable & self.columns.in_memory, self.order)
            return best if resident is None else resident
        return best

    def _close(self, row: int, best: int) -> bool:
        if self.objective == "latency":
            latency = self.times.latency_ms
            return bool(latency[row] <= (1.0 + STEADY) * latency[best])
        bounds = dict(self.bounds)
        for name, column in (
            ("ttft_ms", self.late.ttft_ms),
            ("tpot_ms", self.judged.tpot_ms),
            ("latency_ms", self.late.latency_ms),
        ):
            if not column.item(best) * (1.0 + STEADY) <= bounds.get(name, math.inf):
                return True
        return False

    def displaces(self, row: int) -> bool:
        """Does loading the level unload another one?"""
        budget, used = self.snapshot.for_weights
        loads = not self.columns.in_memory[row]
        return bool(loads and self.columns.resident[row] > max(0, budget - used))

    def _order(self, times: Times) -> Order:
        """The objective's costs, then the policy's preference."""
        prices = Prices(self.columns, self.said.memory_mb, times.latency_ms)
        return (*OBJECTIVES[self.objective](prices), self.standing.rank)

    def nearest(self, mask: Mask) -> int | None:
        """Fewest bounds broken, then by the least in all, then the best."""
        rows = mask.nonzero()[0]
        if len(rows) > 1:
            count, total = self.limits.broken(rows, self.late)
            fewest = count == count.min()
            rows, total = rows[fewest], total[fewest]
            rows = rows[total == total.min()]
        return _first(rows, self.order)

    @property
    def honest(self) -> Mask:
        """Levels that keep the hard bounds."""
        return self.open if self.limits.hard is None else self.open & self.limits.hard

    def failed(self) -> list[Option]:
        """Failed options that a refusal is to be blamed on: but for the failure they would keep
        what has to be kept (`nearest`: the hard bounds), or nothing else can be used at all."""
        rows = [
            row
            for row, facts in enumerate(self.snapshot.levels)
            if facts.state is State.FAILED and self.barrier(row) == "failed"
        ]
        failed = {row: self.option(row) for row in rows}
        if not self.open.any():
            return list(failed.values())
        needed = HARD if self.on_miss == "nearest" else frozenset(dict(self.bounds))
        return [
            option
            for row, option in failed.items()
            if not needed & excess(self.bounds, self.costs(row, warm=True)).keys()
        ]

    def seconds(self, row: int) -> float:
        return self.columns.prepare_s.item(row)

    @property
    def within_wait(self) -> Mask:
        return 1000.0 * self.columns.prepare_s <= self.policy.wait_ms

    def worth_waiting(self, best: int | None) -> Mask:
        """The build breaks no promise, and what it brings is more than a tie-break."""
        if not (self.standing.prospects and self.columns.any_unbuilt):
            return self.columns.none
        mask = self.later & self.columns.unbuilt & self.within_wait
        if not mask.any():
            return mask
        delay = 1000.0 * self.columns.prepare_s
        mask = self.limits.kept(mask, self.late_warm.delayed(delay))
        return mask if best is None else mask & (self.warm_order[0] < self.order[0][best])

    def improvement(self, target: int | None, best: int) -> int | None:
        """`target`, if preparing it is worth it although `best` fits."""
        if target is None or target == best:
            return None
        if self.ask.moment.settling and self.displaces(target):
            return None
        mine, theirs = key(self.warm_order, target), key(self.order, best)
        if mine >= theirs:
            return None
        worth = gain(mine[:-1], theirs[:-1]) * self.warm_times.latency_ms.item(best) / 1000.0
        return target if self.pays(target, worth) else None

    def rescue(self, target: int | None) -> int | None:
        """`target`, if preparing it is worth it because nothing fits."""
        if target is None:
            return None
        return (
            target if self.pays(target, self.warm_times.latency_ms.item(target) / 1000.0) else None
        )

    def pays(self, target: int, seconds_per_request: float) -> bool:
        return self.expected * seconds_per_request > self.seconds(target)

    # -- answering --------------------------------------------------------------------------------

    def barrier(self, row: int) -> str:
        name = self.standing.name(row)
        if not name and not self.open[row]:  # of memory or promises, whichever comes first
            return "promises" if self.roomy[row] else "host_memory"
        return name

    def harmful(self, row: int) -> bool:
        """Would one more sequence at a level break the promise of one that runs?"""
        return self.harmless is not None and not self.harmless[row]

    def costs(self, row: int, *, warm: bool = False, delay_ms: float = 0.0) -> Costs:
        """What a level's bounds are judged by; `warm`: once it is in memory, after `delay_ms`."""
        facts, predicted = self.snapshot.levels[row], self.judged[row]
        if warm or needs_build(facts):
            predicted = predicted.warmed()
        if waited := self.ask.moment.waited_ms:
            predicted = predicted.delayed(waited)
        return costs(facts, predicted.delayed(delay_ms) if delay_ms else predicted)

    def option(self, row: int) -> Option:
        facts, predicted = self.snapshot.levels[row], self.said[row]
        if needs_build(facts):
            predicted = predicted.warmed()
        rank = int(self.standing.rank.item(row))
        if self.fits[row]:
            return Option(facts, predicted, None, {}, rank)
        judged = self.costs(row)
        broken = excess(self.bounds, judged)
        return Option(facts, predicted, judged, broken, rank, self.barrier(row))

    def serve(
        self, row: int, code: Code, prepare: int | None = None, better: int | None = None
    ) -> Decision:
        """`better`: what a steady choice leaves alone; `prepare`: what is made ready meanwhile."""
        option = self.option(row)
        fitting = int(np.count_nonzero(self.usable)) if code == "fits" else 0
        if better is None:
            reason = sentences.served(code, option, self.objective, fitting, self.bounds)
        else:
            reason = sentences.steady(option, self.option(better), self.objective)
        if prepare is not None:
            reason = sentences.preparing(reason, self.option(prepare), self.seconds(prepare))
        build, warm = self._preparation(prepare)
        return self._decision(
            "serve",
            code,
            reason,
            option.predicted,
            level=option.level,
            build=build,
            warm=warm,
            misses=tuple(option.broken),
        )

    def wait(self, row: int, code: Code) -> Decision:
        """What a caller that waits for the level to be prepared gets."""
        option, seconds = self.option(row), self.seconds(row)
        predicted = option.predicted.warmed().delayed(1000.0 * seconds)
        judged = self.costs(row, warm=True, delay_ms=1000.0 * seconds)
        broken = excess(self.bounds, judged)
        reason = sentences.waits(option, seconds)
        return self._decision(
            "wait", code, reason, predicted, build=option.level, misses=tuple(broken)
        )

    def reject(
        self, code: Code, reason: str, *, retry: float | None = None, prepare: int | None = None
    ) -> Decision:
        build, warm = self._preparation(prepare)
        return self._decision(
            "reject",
            code,
            reason,
            None,
            build=build,
            warm=warm,
            retry_after_s=retry,
            could_meet=self.could_meet(),
        )

    def could_meet(self) -> dict[str, float] | None:
        """The bounds, each relaxed as far as the nearest loadable level needs for a request that
        comes in now; rounded outwards."""
        if self.ask.pinned_level is not None or not self.bounds:
            return None
        if self.ask.moment.waited_ms:
            moment = replace(self.ask.moment, waited_ms=0.0)
            anew = replace(self.ask, moment=moment)
            return Case(anew, self.policy, self.snapshot, self.said).could_meet()
        near = self.nearest(self.open & self.columns.loadable)
        if near is None:
            return None
        option = self.option(near)
        return sentences.relaxed(self.bounds, option.broken, option.judged)

    def _decision(
        self,
        action: Action,
        code: Code,
        reason: str,
        predicted: Prediction | None,
        *,
        level: str | None = None,
        build: str | None = None,
        warm: str | None = None,
        misses: tuple[str, ...] = (),
        retry_after_s: float | None = None,
        could_meet: dict[str, float] | None = None,
    ) -> Decision:
        return Decision(
            policy=self.policy.name,
            budget=self.budget,
            objective=self.objective,
            action=action,
            level=level,
            build=build,
            reason=reason,
            predicted=predicted,
            retry_after_s=retry_after_s,
            could_meet=could_meet,
            code=code,
            judge=self._verdicts,
            case=self,
            misses=misses,
            warm=warm,
        )

    def _preparation(self, row: int | None) -> tuple[str | None, str | None]:
        """(level to build, level to load) in the background; work under way needs no second
        order."""
        if row is None:
            return None, None
        facts = self.snapshot.levels[row]
        return (
            facts.level if facts.state is State.ABSENT else None,
            facts.level if facts.state is State.STORED else None,
        )

    def _verdicts(self) -> tuple[Verdict, ...]:
        return tuple(self._verdict(row) for row in range(len(self.columns)))

    def _verdict(self, row: int) -> Verdict:
        option = self.option(row)
        seconds = self.seconds(row) if needs_build(option.facts) else 0.0
        return Verdict(
            level=option.level,
            state=option.facts.state,
            ok=option.fits,
            why=sentences.verdict(option, self.bounds, seconds),
            predicted=option.predicted,
            estimated=not option.facts.card.measured,
            misses=(*option.broken, *((option.barrier,) if option.barrier else ())),
        )


def first(mask: Mask, order: Order) -> int | None:
    """The row of `mask` that comes first in `order`."""
    return _first(mask.nonzero()[0], order)


def _first(rows: Rows, order: Order) -> int | None:
    for column in order:
        if len(rows) < 2:
            break
        values = column[rows]
        rows = rows[values == values.item(values.argmin())]
    return int(rows[0]) if len(rows) else None


def key(order: Order, row: int) -> Key:
    """One row's costs in an order."""
    return tuple(column.item(row) for column in order)
