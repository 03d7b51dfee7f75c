"""The decision written level by level, in plain Python: the oracle of the columnar one.

It follows the tree of `gateway.policy.decide` with one object per level and no arrays, on what
`scalar_predict` says. Words are shared with the real one (`sentences`), numbers are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gateway.engine.base import EngineStats
from gateway.policy import sentences
from gateway.policy.budget import HARD, Bounds, Budget, Costs, Objective, OnMiss, excess
from gateway.policy.decide import REFUSED_PINS, RETRY_SECONDS
from gateway.policy.decision import Action, Ask, Code, Decision, Verdict
from gateway.policy.judge import BARRIERS, PASSING, costs
from gateway.policy.moment import CALM
from gateway.policy.objective import Key, Option
from gateway.policy.policy import Policy
from gateway.policy.prediction import Prediction
from gateway.variants.variant import LadderSnapshot, LevelFacts, State
from tests.policy.scalar_predict import ScalarPredictor

UNKNOWN_BUILD_SECONDS = 60.0


def needs_build(facts: LevelFacts) -> bool:
    return facts.state in (State.ABSENT, State.BUILDING)


def judge(
    ask: Ask,
    policy: Policy,
    bounds: Bounds,
    snapshot: LadderSnapshot,
    predictions: Sequence[Prediction],
) -> tuple[Option, ...]:
    """One option per level, in ladder order. Loading counts in a level's times, building does not:
    an absent level is judged as it will be once it is in memory."""
    ranks = {level: rank for rank, level in enumerate(policy.levels)}
    room = _room(snapshot)
    options = []
    for index, (facts, prediction) in enumerate(zip(snapshot.levels, predictions, strict=True)):
        predicted = prediction.warmed() if needs_build(facts) else prediction
        judged = late(ask, policy, facts, prediction, warm=needs_build(facts))
        barrier = _barrier(facts, policy, snapshot.for_weights[0], room)
        if not barrier and _harmful(ask, policy, facts, prediction):
            barrier = "promises"
        options.append(
            Option(
                facts=facts,
                predicted=predicted,
                judged=judged,
                broken=excess(bounds, judged),
                rank=ranks.get(facts.level, len(ranks) + index),
                barrier=barrier,
            )
        )
    return tuple(options)


def late(
    ask: Ask,
    policy: Policy,
    facts: LevelFacts,
    prediction: Prediction,
    *,
    warm: bool,
    delay_ms: float = 0.0,
) -> Costs:
    """What bounds are judged by: the times that the promised share of answers keeps, from arrival
    on."""
    predicted = prediction.high(policy.confidence)
    predicted = predicted.warmed() if warm else predicted
    return costs(facts, predicted.delayed(ask.moment.waited_ms).delayed(delay_ms))


def _harmful(ask: Ask, policy: Policy, facts: LevelFacts, prediction: Prediction) -> bool:
    """Would one more sequence break the promise of one that runs?"""
    high, moment = prediction.high(policy.confidence), ask.moment
    rate = facts.card.prefill_tokens_per_s
    prompt_ms = 1000.0 / rate * ask.prompt_tokens if rate > 0 else 0.0
    return high.tpot_ms > moment.token_ms or prompt_ms > moment.slack_ms


def once_ready(case: Case) -> list[Option]:
    """The options not in memory yet that keep every bound once they are, priced as they will be."""
    ready = []
    for option, prediction in zip(case.options, case.predictions, strict=True):
        if option.barrier or option.facts.state is State.READY:
            continue
        judged = late(case.ask, case.policy, option.facts, prediction, warm=True)
        if not excess(case.bounds, judged):
            predicted = prediction.warmed()
            ready.append(replace(option, predicted=predicted, judged=judged, broken={}))
    return ready


def prepare_seconds(facts: LevelFacts, snapshot: LadderSnapshot) -> float:
    """Expected seconds until the level is in memory: builds before it, its build, its load."""
    if facts.state is State.READY:
        return 0.0
    seconds = facts.card.load_seconds
    if needs_build(facts):
        seconds += _build_seconds(facts)
        seconds += sum(
            _build_seconds(other)
            for other in snapshot.levels
            if other.state is State.BUILDING and facts.state is State.ABSENT
        )
    return seconds


def _build_seconds(facts: LevelFacts) -> float:
    seconds = facts.card.build_seconds
    return seconds if seconds > 0 else UNKNOWN_BUILD_SECONDS


def _room(snapshot: LadderSnapshot) -> int:
    """Bytes a new level may take: what weights may take less what cannot be unloaded for it.

    Only idle levels of this ladder count as unloadable. Whatever else is taken stays taken: levels
    in use, levels on their way in or out, and everything of other models, whose leases a snapshot
    does not tell (the pool may find more room than this, hardly less).
    """
    budget, used = snapshot.for_weights
    idle = sum(
        facts.card.resident_bytes
        for facts in snapshot.levels
        if facts.state is State.READY and not facts.held
    )
    return max(0, budget - max(0, used - idle))


def _barrier(facts: LevelFacts, policy: Policy, weight_budget: int, room: int) -> str:
    if policy.levels and facts.level not in policy.levels:
        return "levels"
    resident = facts.card.resident_bytes
    in_memory = facts.state in (State.READY, State.LOADING, State.DRAINING)
    if not in_memory and resident > weight_budget:
        return "too_large"
    if facts.state in (State.FAILED, State.DRAINING):
        return facts.state.value
    if facts.state is State.ABSENT and not policy.build:
        return "not_built"
    # In memory, its bytes count as used already.
    return "" if in_memory or resident <= room else "host_memory"


def loss(option: Option) -> float:
    """`Card.loss` in steps of 0.1 %: closer levels cannot be told apart by the texts at hand, and
    noise must not send everybody to a slower level."""
    exact = option.facts.card.loss
    return exact if math.isinf(exact) else round(exact, 3)


def _quality(option: Option) -> Key:
    # Of equals the smaller: the momentarily quicker would spread one class of requests over
    # several levels, which then slow each other down.
    return (loss(option), option.predicted.memory_mb, option.predicted.latency_ms)


def _latency(option: Option) -> Key:
    return (option.predicted.latency_ms, loss(option), option.predicted.memory_mb)


def _memory(option: Option) -> Key:
    return (option.predicted.memory_mb, loss(option), option.predicted.latency_ms)


def _throughput(option: Option) -> Key:
    rates = option.facts.card.decode_tokens_per_s.values()
    rate = max((rate for rate in rates if rate > 0), default=0.0)
    ms_per_token = 1000.0 / rate if rate else math.inf
    return (ms_per_token, loss(option), option.predicted.latency_ms)


OBJECTIVES = {
    "quality": _quality,
    "latency": _latency,
    "memory": _memory,
    "throughput": _throughput,
}


def key(objective: Objective, option: Option) -> Key:
    """Total order of options: the objective's costs, then the policy's preference."""
    return (*OBJECTIVES[objective](option), option.rank)


def gain(objective: Objective, better: Option, worse: Option) -> float:
    """How much cheaper `better` is in the first cost that differs, relative; 0 when it is not."""
    pairs = zip(OBJECTIVES[objective](better), OBJECTIVES[objective](worse), strict=True)
    for low, high in pairs:
        if low != high:
            return min(100.0, max(0.0, high / low - 1.0)) if low > 0 else 100.0 * (low < high)
    return 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """One request under one policy on one ladder, every level judged."""

    ask: Ask
    policy: Policy
    snapshot: LadderSnapshot
    predictor: ScalarPredictor
    budget: Budget
    bounds: Bounds
    objective: Objective
    on_miss: OnMiss
    predictions: tuple[Prediction, ...]
    options: tuple[Option, ...]

    @classmethod
    def of(
        cls, ask: Ask, policy: Policy, snapshot: LadderSnapshot, predictor: ScalarPredictor
    ) -> Case:
        budget = ask.sla.intersect(policy.budget)
        bounds = budget.bounds()
        predictions = predictor.each(ask.prompt_tokens, ask.max_tokens, snapshot)
        return cls(
            ask=ask,
            policy=policy,
            snapshot=snapshot,
            predictor=predictor,
            budget=budget,
            bounds=bounds,
            objective=ask.sla.objective or policy.objective,
            on_miss=ask.sla.on_miss or policy.on_miss,
            predictions=predictions,
            options=judge(ask, policy, bounds, snapshot, predictions),
        )

    # -- choosing ---------------------------------------------------------------------------------

    def key(self, option: Option) -> Key:
        return key(self.objective, option)

    def option(self, level: str) -> Option:
        return next(option for option in self.options if option.level == level)

    def best(self, options: Iterable[Option]) -> Option | None:
        return min(options, key=self.key, default=None)

    def nearest(self, options: Iterable[Option]) -> Option | None:
        """Fewest bounds broken, then by the least in all, then the best."""
        return min(
            options,
            key=lambda o: (len(o.broken), _total(o.broken.values()), self.key(o)),
            default=None,
        )

    def honest(self) -> list[Option]:
        """Options that keep the hard bounds."""
        return [o for o in self.options if not o.barrier and not HARD & o.broken.keys()]

    def failed(self) -> list[Option]:
        """Failed options that a refusal is to be blamed on: but for the failure they would keep
        what has to be kept (`nearest`: the hard bounds), or nothing else can be used at all."""
        failed = [option for option in self.options if option.barrier == "failed"]
        if all(option.barrier for option in self.options):
            return failed
        needed = HARD if self.on_miss == "nearest" else frozenset(dict(self.bounds))
        return [
            option
            for option in failed
            if not needed & excess(self.bounds, self.judged(option, warm=True)).keys()
        ]

    def seconds(self, option: Option) -> float:
        return prepare_seconds(option.facts, self.snapshot)

    def delayed(self, option: Option) -> Prediction:
        """What a caller that waits for the option to be prepared gets."""
        return option.predicted.warmed().delayed(1000.0 * self.seconds(option))

    def within_wait(self, option: Option) -> bool:
        return 1000.0 * self.seconds(option) <= self.policy.wait_ms

    def worth_waiting(self, option: Option, best: Option | None) -> bool:
        """The build breaks no promise, and what it brings is more than a tie-break."""
        return (
            needs_build(option.facts)
            and self.within_wait(option)
            and not excess(
                self.bounds,
                self.judged(option, warm=True, delay_ms=1000.0 * self.seconds(option)),
            )
            and (best is None or self.key(option)[0] < self.key(best)[0])
        )

    def improvement(self, target: Option | None, best: Option) -> Option | None:
        """`target`, if preparing it is worth it although `best` fits."""
        if target is None or target.level == best.level or self.key(target) >= self.key(best):
            return None
        if self.ask.moment.settling and self.displaces(target):
            return None
        worth = gain(self.objective, target, best) * best.predicted.warmed().latency_ms / 1000.0
        return target if self.pays(target, worth) else None

    def rescue(self, target: Option | None) -> Option | None:
        """`target`, if preparing it is worth it because nothing fits."""
        if target is None:
            return None
        return target if self.pays(target, target.predicted.latency_ms / 1000.0) else None

    def pays(self, target: Option, seconds_per_request: float) -> bool:
        return self.expected * seconds_per_request > self.seconds(target)

    @property
    def expected(self) -> float:
        learned = self.ask.moment.expected
        return self.policy.expected_requests if learned is None else learned

    def judged(self, option: Option, *, warm: bool, delay_ms: float = 0.0) -> Costs:
        prediction = self.predictions[
            next(row for row, facts in enumerate(self.snapshot.levels) if facts is option.facts)
        ]
        return late(self.ask, self.policy, option.facts, prediction, warm=warm, delay_ms=delay_ms)

    def displaces(self, option: Option) -> bool:
        """Does loading it unload another level?"""
        budget, used = self.snapshot.for_weights
        loaded = option.facts.state in (State.READY, State.LOADING, State.DRAINING)
        return not loaded and option.facts.card.resident_bytes > max(0, budget - used)

    def steady(self, best: Option) -> Option:
        """`best`, or the level that serving it instead would be restless of."""
        moment, usable = self.ask.moment, [o for o in self.options if o.fits and o.facts.loadable]
        recent = next((o for o in usable if o.level == moment.recent), None)
        if recent is not None and recent is not best and self._close(recent, best):
            best = recent
        if moment.settling and self.displaces(best):
            resident = [o for o in usable if o.facts.state in (State.READY, State.LOADING)]
            return self.best(resident) or best
        return best

    def _close(self, recent: Option, best: Option) -> bool:
        if self.objective == "latency":
            return recent.predicted.latency_ms <= 1.1 * best.predicted.latency_ms
        have = best.judged
        return any(
            1.1 * getattr(have, name) > bound
            for name, bound in self.bounds
            if name in ("ttft_ms", "tpot_ms", "latency_ms")
        )

    def fitting(self) -> int:
        return sum(o.fits and o.facts.loadable for o in self.options)

    # -- answering --------------------------------------------------------------------------------

    def serve(
        self,
        option: Option,
        code: Code,
        prepare: Option | None = None,
        better: Option | None = None,
    ) -> Decision:
        if better is None:
            reason = sentences.served(code, option, self.objective, self.fitting(), self.bounds)
        else:
            reason = sentences.steady(option, better, self.objective)
        if prepare is not None:
            reason = sentences.preparing(reason, prepare, self.seconds(prepare))
        decision = self._decision("serve", code, reason, option.predicted)
        build, warm = _preparation(prepare)
        return replace(
            decision, level=option.level, build=build, warm=warm, misses=tuple(option.broken)
        )

    def wait(self, option: Option, code: Code) -> Decision:
        predicted = self.delayed(option)
        reason = sentences.waits(option, self.seconds(option))
        broken = excess(
            self.bounds, self.judged(option, warm=True, delay_ms=1000.0 * self.seconds(option))
        )
        decision = self._decision("wait", code, reason, predicted)
        return replace(decision, build=option.level, misses=tuple(broken))

    def reject(
        self, code: Code, reason: str, *, retry: float | None = None, prepare: Option | None = None
    ) -> Decision:
        build, warm = _preparation(prepare)
        return replace(
            self._decision("reject", code, reason, None),
            retry_after_s=retry,
            build=build,
            warm=warm,
            could_meet=self.could_meet(),
        )

    def could_meet(self) -> dict[str, float] | None:
        """The bounds, each relaxed as far as the nearest loadable level needs; rounded outwards."""
        if self.ask.pinned_level is not None or not self.bounds:
            return None
        if self.ask.moment.waited_ms:
            moment = replace(self.ask.moment, waited_ms=0.0)
            anew = replace(self.ask, moment=moment)
            return Case.of(anew, self.policy, self.snapshot, self.predictor).could_meet()
        near = self.nearest(o for o in self.options if o.facts.loadable and not o.barrier)
        return None if near is None else sentences.relaxed(self.bounds, near.broken, near.judged)

    def _decision(
        self, action: Action, code: Code, reason: str, predicted: Prediction | None
    ) -> Decision:
        return Decision(
            policy=self.policy.name,
            budget=self.budget,
            objective=self.objective,
            action=action,
            level=None,
            build=None,
            reason=reason,
            predicted=predicted,
            retry_after_s=None,
            could_meet=None,
            code=code,
            judge=self._verdicts,
        )

    def _verdicts(self) -> tuple[Verdict, ...]:
        return tuple(self._verdict(option) for option in self.options)

    def _verdict(self, option: Option) -> Verdict:
        seconds = self.seconds(option) if needs_build(option.facts) else 0.0
        return Verdict(
            level=option.level,
            state=option.facts.state,
            ok=option.fits,
            why=sentences.verdict(option, self.bounds, seconds),
            predicted=option.predicted,
            estimated=not option.facts.card.measured,
            misses=(*option.broken, *((option.barrier,) if option.barrier else ())),
        )


def _preparation(option: Option | None) -> tuple[str | None, str | None]:
    """(level to build, level to load) in the background; work under way needs no second order."""
    if option is None:
        return None, None
    return (
        option.level if option.facts.state is State.ABSENT else None,
        option.level if option.facts.state is State.STORED else None,
    )


def _total(values: Iterable[float]) -> float:
    """Left to right: `sum` compensates its rounding since Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    return total


def decide(
    ask: Ask, policy: Policy, snapshot: LadderSnapshot, predictor: ScalarPredictor
) -> Decision:
    case = Case.of(ask, policy, snapshot, predictor)
    if ask.pinned_level is not None:
        return _pinned(case, ask.pinned_level)  # (1)

    best = case.best(option for option in case.options if option.fits and option.facts.loadable)
    later = once_ready(case)
    if case.on_miss == "wait":
        better = case.best(option for option in later if case.worth_waiting(option, best))
        if better is not None:
            return case.wait(better, "waits")  # (2)
    target = case.best(later)
    if best is not None:
        level = case.steady(best)
        if level is not best:
            return case.serve(level, "steady", better=best)  # (3a), (3b)
        return case.serve(best, "fits", case.improvement(target, best))  # (3)
    return _missed(case, later, target)  # (4)-(7)


def _pinned(case: Case, level: str) -> Decision:
    option = next((o for o in case.options if o.level == level), None)
    if option is None:
        known = ", ".join(o.level for o in case.options) or "empty"
        return case.reject("unknown_level", f"{level} is not in the ladder ({known}).")  # (1a)
    if option.barrier in REFUSED_PINS:
        reason = sentences.refused(option, case.policy.name)
        retry = _tried_again_in(option) if option.barrier == "failed" else None
        return case.reject(REFUSED_PINS[option.barrier], reason, retry=retry)  # (1a)
    prediction = case.predictions[
        next(row for row, facts in enumerate(case.snapshot.levels) if facts is option.facts)
    ]
    harmful = _harmful(case.ask, case.policy, option.facts, prediction)
    if option.barrier == "draining" or harmful:
        why = "draining" if option.barrier == "draining" else "promises"
        reason = f"{level} is {BARRIERS[why]}."
        return case.reject("busy", reason, retry=RETRY_SECONDS[0])  # (1c)
    if option.facts.loadable:
        return case.serve(option, "pinned")  # (1b); the pool makes room or refuses
    if case.on_miss == "reject" or not case.within_wait(option):
        return _to_build(case, option)  # (1d)
    return case.wait(option, "pinned")  # (1d)


def _missed(case: Case, later: list[Option], target: Option | None) -> Decision:
    """No level fits now. `later`: the levels that would, `target`: the best of them."""
    if case.on_miss == "wait":
        waitable = case.best(option for option in later if case.within_wait(option))
        if waitable is not None and needs_build(waitable.facts):
            return case.wait(waitable, "waits")  # (4)
        if waitable is not None:
            return case.serve(case.option(waitable.level), "cold")  # (4)
    if case.on_miss == "nearest":
        near = case.nearest(option for option in case.honest() if option.facts.loadable)
        if near is not None:
            return case.serve(near, "nearest", case.rescue(target))  # (5)
        near = case.nearest(option for option in case.honest() if case.within_wait(option))
        if near is not None:
            return case.wait(near, "waits")  # (6)
    return _reject(case, target)  # (7)


def _reject(case: Case, target: Option | None) -> Decision:
    under_way = target is not None and target.facts.state in (State.BUILDING, State.LOADING)
    if target is not None and (under_way or case.rescue(target) is not None):
        return _to_build(case, target)  # (7a)
    retry = _calm_in(case)
    if retry is not None:
        harmful = all(
            _harmful(case.ask, case.policy, option.facts, prediction)
            for option, prediction in zip(case.options, case.predictions, strict=True)
        )
        reason = sentences.busy(_sequences(case), retry, harmful=harmful)
        return case.reject("busy", reason, retry=retry)  # (7b)
    failed = min(case.failed(), key=_tried_again_in, default=None)
    if failed is not None:
        retry = _tried_again_in(failed)
        return case.reject("failed", sentences.failure(failed, retry), retry=retry)  # (7c)
    if target is not None:
        return case.reject(
            "unmet", sentences.unpaid(target, case.seconds(target), case.expected)
        )  # (7d)
    near = case.nearest(option for option in case.options if not option.barrier)
    return case.reject("unmet", sentences.unmet(near, len(case.options), case.bounds))  # (7d)


def _to_build(case: Case, option: Option) -> Decision:
    seconds = max(RETRY_SECONDS[0], case.seconds(option))
    reason = sentences.to_build(option, seconds)
    return case.reject("building", reason, retry=seconds, prepare=option)


def _tried_again_in(failed: Option) -> float:
    return max(RETRY_SECONDS[0], failed.facts.retry_s)


def _calm_in(case: Case) -> float | None:
    """Seconds until the load that keeps every level from fitting may have passed; None: it is not
    the load."""
    calm = Case.of(
        replace(case.ask, moment=CALM), case.policy, _idle(case.snapshot), case.predictor
    )
    fits = {
        option.level
        for option in (*calm.options, *once_ready(calm))
        if option.fits and option.facts.loadable
    }
    waits = [
        (now.predicted.ttft_ms - then.predicted.ttft_ms) / 1000.0
        for now, then in zip(case.options, calm.options, strict=True)
        if now.level in fits and (now.broken or now.barrier in PASSING)
    ]
    low, high = RETRY_SECONDS
    return min(high, max(low, min(waits))) if waits else None


def _idle(snapshot: LadderSnapshot) -> LadderSnapshot:
    """The same ladder with nobody using it."""
    levels = tuple(
        replace(
            facts,
            stats=EngineStats(),
            leases=0,
            state=State.STORED if facts.state is State.DRAINING else facts.state,
        )
        for facts in snapshot.levels
    )
    return replace(snapshot, levels=levels, host_running=0, host_waiting_prompt_tokens=0)


def _sequences(case: Case) -> int:
    return sum(o.facts.stats.running + o.facts.stats.waiting for o in case.options)
