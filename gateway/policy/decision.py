"""The nouns of deciding: what is asked, each level's verdict, what was decided. Pure data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from gateway.policy.budget import Budget, Objective, Sla
from gateway.policy.moment import CALM, Moment
from gateway.policy.prediction import Prediction, Predictions
from gateway.variants.variant import LadderSnapshot, State

if TYPE_CHECKING:
    from gateway.policy.case import Case

Action = Literal["serve", "wait", "reject"]
Code = Literal[
    "fits", "steady", "nearest", "cold", "waits", "pinned",  # served or waited for
    "building", "busy", "unmet", "unknown_level", "not_allowed", "failed", "too_large",  # rejected
]  # fmt: skip
Predict = Callable[[int, int, LadderSnapshot], Predictions]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for, and what it meets. `prompt_tokens` and `max_tokens` are of one
    sequence."""

    model: str
    prompt_tokens: int
    max_tokens: int
    pinned_level: str | None = None
    sla: Sla = field(default_factory=Sla)
    moment: Moment = CALM


@dataclass(frozen=True, slots=True)
class Verdict:
    """One level, judged. For a level to be built, `predicted` holds once it is in memory.

    Attributes:
        ok: it keeps the budget and may be used (perhaps after a build).
        misses: budget fields it breaks, and the barrier it stands behind, if any.
        estimated: its card is an estimate, not a measurement.
    """

    level: str
    state: State
    ok: bool
    why: str
    predicted: Prediction | None
    estimated: bool
    misses: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What to do with a request, and why.

    Attributes:
        policy: name of the policy.
        budget: the effective budget.
        level: what serves, ready or loadable; set exactly when `action` is `serve`.
        build: a level to build: waited for when `action` is `wait`, else in the background.
        warm: a stored level worth loading in the background.
        reason: one short sentence for the caller.
        predicted: expected costs of the level served or waited for, counted from the decision; a
            build that is waited for is included.
        misses: budget fields that the decision is predicted to break, knowingly: times by the
            quantile of the policy's confidence, with what the request has waited before.
        retry_after_s: when rejected and a retry can succeed.
        could_meet: when rejected: the request's bounds, relaxed until a level keeps them now.
        code: the reason as one of a few words, for metrics and for the error's class.
        judge: gives the verdicts; asked only when somebody wants to see them, because putting
            every level's verdict into words takes longer than deciding.
        case: what was decided on, for whoever explains the decision afterwards.
    """

    policy: str
    budget: Budget
    objective: Objective
    action: Action
    level: str | None
    build: str | None
    reason: str
    predicted: Prediction | None
    retry_after_s: float | None
    could_meet: dict[str, float] | None
    code: Code
    judge: Callable[[], tuple[Verdict, ...]] = field(repr=False, compare=False)
    misses: tuple[str, ...] = ()
    warm: str | None = None
    case: Case | None = field(default=None, repr=False, compare=False)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every level's verdict, in ladder order."""
        return self.judge()
