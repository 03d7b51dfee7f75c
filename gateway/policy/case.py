"""One request with its options: the verbs that the decision tree is written in. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gateway.policy import sentences
from gateway.policy.budget import HARD, Bounds, Budget, Objective, OnMiss, excess
from gateway.policy.decision import Action, Ask, Code, Decision, Predict, Verdict
from gateway.policy.judge import costs, judge, needs_build, prepare_seconds
from gateway.policy.objective import Key, Option, gain, key
from gateway.policy.policy import Policy
from gateway.policy.predictor import Prediction
from gateway.variants.variant import LadderSnapshot, State


@dataclass(frozen=True, slots=True)
class Case:
    """One request under one policy on one ladder, every level judged."""

    ask: Ask
    policy: Policy
    snapshot: LadderSnapshot
    predict: Predict
    budget: Budget
    bounds: Bounds
    objective: Objective
    on_miss: OnMiss
    options: tuple[Option, ...]

    @classmethod
    def of(cls, ask: Ask, policy: Policy, snapshot: LadderSnapshot, predict: Predict) -> Case:
        budget = ask.sla.intersect(policy.budget)
        bounds = budget.bounds()
        predictions = predict(ask.prompt_tokens, ask.max_tokens, snapshot)
        return cls(
            ask=ask,
            policy=policy,
            snapshot=snapshot,
            predict=predict,
            budget=budget,
            bounds=bounds,
            objective=ask.sla.objective or policy.objective,
            on_miss=ask.sla.on_miss or policy.on_miss,
            options=judge(bounds, policy, snapshot, predictions),
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
            key=lambda o: (len(o.broken), sum(o.broken.values()), self.key(o)),
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
            if not needed
            & excess(self.bounds, costs(option.facts, option.predicted.warmed())).keys()
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
            and not excess(self.bounds, costs(option.facts, self.delayed(option)))
            and (best is None or self.key(option)[0] < self.key(best)[0])
        )

    def improvement(self, target: Option | None, best: Option) -> Option | None:
        """`target`, if preparing it is worth it although `best` fits."""
        if target is None or target.level == best.level or self.key(target) >= self.key(best):
            return None
        worth = gain(self.objective, target, best) * best.predicted.warmed().latency_ms / 1000.0
        return target if self.pays(target, worth) else None

    def rescue(self, target: Option | None) -> Option | None:
        """`target`, if preparing it is worth it because nothing fits."""
        if target is None:
            return None
        return target if self.pays(target, target.predicted.latency_ms / 1000.0) else None

    def pays(self, target: Option, seconds_per_request: float) -> bool:
        return self.policy.expected_requests * seconds_per_request > self.seconds(target)

    # -- answering --------------------------------------------------------------------------------

    def serve(self, option: Option, code: Code, prepare: Option | None = None) -> Decision:
        reason = sentences.served(code, option, self.objective, self.options, self.bounds)
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
        broken = excess(self.bounds, costs(option.facts, predicted))
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
        near = self.nearest(o for o in self.options if o.facts.loadable and not o.barrier)
        if near is None:
            return None
        return sentences.relaxed(self.bounds, near.broken, costs(near.facts, near.predicted))

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
