"""A candidate for a policy, tried on a share of its requests. Pure: who gets it, and whether its
attainment has fallen.

The test may be asked after every answer: it is anytime-valid. With X met of N requests an arm's
likelihood ratio against a rate p, mixed over all rates by Jeffreys' prior,
M(p) = B(½+X, ½+N-X) / (B(½, ½) p^X (1-p)^(N-X)), is a martingale when p is the truth, and so is the
product of both arms'. The evidence against "the candidate attains at most d less" is the least
product over all pairs of rates that are at most d apart; by Ville's inequality it ever reaches 1/α
with probability at most α (Robbins 1970, "Statistical methods related to the law of the iterated
logarithm"; for two samples Turner, Ly and Grünwald 2021, "Generic E-variables for exact sequential
k-sample tests"). Requests count as independent; a busy spell hits both arms alike, for the split is
by caller and not by time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.policy.policy import Policy

ALPHA: Final = (
    0.05  # probability of ending a rollout that lowers attainment by no more than allowed
)
_ENOUGH: Final = -math.log(ALPHA)
_STEPS: Final = 40  # halvings: rates to 1e-12

Arm = Literal["stable", "canary"]
State = Literal["collecting", "falls", "holds"]


class Plan(BaseModel):
    """How a candidate is tried.

    Attributes:
        percent: share of the requests that get it; below 100, for it is held against the others.
        min_requests: outcomes of the candidate before anything is concluded.
        max_drop: how much less it may attain than the policy in force, as a share of requests.
        sticky: the same user (else API key) always gets the same arm; otherwise each request is
            drawn by itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    percent: Annotated[float, Field(gt=0, lt=100, allow_inf_nan=False)] = 10.0
    min_requests: Annotated[int, Field(ge=1, le=10**9)] = 50
    max_drop: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.05
    sticky: bool = True


@dataclass(frozen=True, slots=True)
class Split:
    """Both arms of a rollout. `salt` keeps rollouts from trying the same callers every time."""

    stable: Policy
    canary: Policy
    plan: Plan
    salt: str

    def choose(self, api_key: str | None, user: str | None, seed: str) -> Policy:
        """The arm of a request; the same whenever asked again."""
        unit = seed
        if self.plan.sticky and user is not None:
            unit = f"user {api_key or ''}\n{user}"
        elif self.plan.sticky and api_key is not None:
            unit = f"key {api_key}"
        return self.canary if share(self.salt, unit) < self.plan.percent / 100.0 else self.stable


def share(salt: str, unit: str) -> float:
    """Where a unit lies between 0 and 1: evenly spread, independent of other salts. A larger
    percentage keeps everybody whom a smaller one had."""
    digest = blake2b(f"{salt}\n{unit}".encode(errors="replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53  # below 1 even after rounding


@dataclass(frozen=True, slots=True)
class Tally:
    """Outcomes of one arm: how many requests there were and how many kept all their bounds."""

    requests: int = 0
    met: int = 0

    @property
    def attainment(self) -> float | None:
        return self.met / self.requests if self.requests else None

    def plus(self, other: Tally) -> Tally:
        return Tally(self.requests + other.requests, self.met + other.met)

    def json(self) -> dict[str, Any]:
        return {"requests": self.requests, "met": self.met, "attainment": self.attainment}


@dataclass(frozen=True, slots=True)
class Counts:
    """Outcomes of both arms."""

    stable: Tally = Tally()
    canary: Tally = Tally()

    def counting(self, arm: Arm, *, met: bool) -> Counts:
        one = Tally(1, int(met))
        if arm == "stable":
            return replace(self, stable=self.stable.plus(one))
        return replace(self, canary=self.canary.plus(one))

    def plus(self, other: Counts) -> Counts:
        return Counts(self.stable.plus(other.stable), self.canary.plus(other.canary))


def state_of(plan: Plan, counts: Counts) -> State:
    """`falls`: surely more than `max_drop` below; `holds`: surely not; else still collecting."""
    if counts.canary.requests < plan.min_requests:
        return "collecting"
    if not _weak(counts, plan.max_drop, "above"):
        return "falls"
    return "collecting" if _weak(counts, plan.max_drop, "below") else "holds"


def drop_between(counts: Counts) -> tuple[float, float]:
    """Bounds on the drop in attainment, each overstepped ever with probability at most α."""
    return _edge(counts, "above", -1.0), _edge(counts, "below", 1.0)


def log_evidence(counts: Counts, drop: float, side: Literal["above", "below"]) -> float:
    """Log of the evidence that the true drop (stable minus canary) is above or below `drop`; 0 when
    the outcomes themselves are on the other side."""
    stable, canary = counts.stable, counts.canary
    if not stable.requests or not canary.requests:
        return 0.0
    assert stable.attainment is not None
    assert canary.attainment is not None
    seen = stable.attainment - canary.attainment
    if (seen <= drop) if side == "above" else (seen >= drop):
        return 0.0
    rate = _likeliest(counts, drop)
    return _log_ratio(stable, rate + drop) + _log_ratio(canary, rate)


def _likeliest(counts: Counts, drop: float) -> float:
    """The canary's rate that explains both arms best when they are `drop` apart.

    The log-likelihood is concave, so its slope changes its sign once.
    """
    low, high = max(0.0, -drop), min(1.0, 1.0 - drop)
    for _ in range(_STEPS):
        rate = (low + high) / 2
        slope = _slope(counts.canary, rate) + _slope(counts.stable, rate + drop)
        low, high = (rate, high) if slope > 0 else (low, rate)
    return (low + high) / 2


def _slope(tally: Tally, rate: float) -> float:
    missed = tally.requests - tally.met
    up = tally.met / rate if rate > 0 else (math.inf if tally.met else 0.0)
    down = missed / (1 - rate) if rate < 1 else (math.inf if missed else 0.0)
    if math.inf == up == down:
        return 0.0
    return up - down


def _log_ratio(tally: Tally, rate: float) -> float:
    """ln M(rate)."""
    met, missed = tally.met, tally.requests - tally.met
    mixed = math.lgamma(0.5 + met) + math.lgamma(0.5 + missed) - math.lgamma(1 + tally.requests)
    return mixed - math.log(math.pi) - _times_log(met, rate) - _times_log(missed, 1.0 - rate)


def _times_log(count: int, rate: float) -> float:
    """count × ln rate, 0 × ln 0 being 0."""
    if not count:
        return 0.0
    return count * math.log(rate) if rate > 0 else -math.inf


def _edge(counts: Counts, side: Literal["above", "below"], farthest: float) -> float:
    """The drop at which the evidence for lying on its `side` stops being enough."""
    stable, canary = counts.stable.attainment, counts.canary.attainment
    if stable is None or canary is None or _weak(counts, farthest, side):
        return farthest
    excluded, kept = farthest, stable - canary
    for _ in range(_STEPS):
        middle = (excluded + kept) / 2
        if _weak(counts, middle, side):
            kept = middle
        else:
            excluded = middle
    return excluded


def _weak(counts: Counts, drop: float, side: Literal["above", "below"]) -> bool:
    return log_evidence(counts, drop, side) < _ENOUGH
