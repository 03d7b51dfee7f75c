"""Decides how one request is served: pure, deterministic, no clock, no I/O.

The decision tree (the code carries the numbers). A level *fits* when it keeps every bound of the
effective budget (request ∩ policy), stands behind no barrier (policy's levels, failed, draining,
host memory, may not be built), and needs no build; loading counts in its times. A level *would fit*
when all that holds once it is in memory. "Best" is the objective's order.

    1. Pinned level: that level or nothing; bounds only report.
       1a. not in the ladder, not among the policy's levels, too large: reject. Failed: reject,
           retry when it is tried again.
       1b. loadable: serve it.
       1c. being unloaded: reject, retry soon.
       1d. to be built: wait for it, or reject when the policy says so or the build is too long.
    2. on_miss `wait`, and a level that would fit beats the best that fits in the objective itself,
       and waiting for its build breaks no bound and no `wait_ms`: wait for it.
    3. Some level fits: serve the best. A better one that would fit is prepared meanwhile, if that
       pays.
    4. on_miss `wait`: the best level that would fit within `wait_ms` is waited for (served at once
       when it only has to be loaded), although the wait itself may break a time bound.
    5. on_miss `nearest`: serve the loadable level that breaks the fewest time bounds by the least.
       The best level that would fit is prepared meanwhile, if that pays.
    6. on_miss `nearest`, but no loadable level keeps the hard bounds (memory, quality), which are
       never traded: wait for the nearest level that keeps them, if its build fits `wait_ms`.
    7. Reject.
       7a. a level would fit and is being prepared, or preparing it pays: retry when it is ready.
       7b. a level would fit if the host were less busy: retry then.
       7c. only a failure stands in the way: no level is usable but for failed ones, or a failed one
           would keep what must be kept. Retry when it is tried again.
       7d. no level can keep the budget: say which budget could be met.

Preparing *pays* when expected_requests × gain > seconds of preparing. The gain per request is its
predicted duration times the relative improvement of the objective, or its whole duration when its
promise would otherwise be broken. What the policy waits for need not pay.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Final

from gateway.engine.base import EngineStats
from gateway.policy import sentences
from gateway.policy.case import Case
from gateway.policy.decision import Action, Ask, Code, Decision, Predict, Verdict
from gateway.policy.judge import BARRIERS, PASSING, needs_build, once_ready
from gateway.policy.objective import Option
from gateway.policy.policy import Policy
from gateway.variants.variant import LadderSnapshot, State

__all__ = ["Action", "Ask", "Code", "Decision", "Predict", "Verdict", "decide"]

RETRY_SECONDS: Final = (1.0, 60.0)  # bounds of a Retry-After that waits for load to pass
REFUSED_PINS: Final = MappingProxyType[str, Code](
    {
        "levels": "not_allowed",
        "failed": "failed",
        "too_large": "too_large",
        "not_built": "not_allowed",
    }
)


def decide(ask: Ask, policy: Policy, snapshot: LadderSnapshot, predict: Predict) -> Decision:
    """The decision for `ask` under `policy`, given the ladder as it is and what things would cost.

    `predict(prompt_tokens, max_tokens, snapshot)` gives one prediction per level, in ladder order.
    Total: every input gets exactly one of serve, wait, reject.
    """
    case = Case.of(ask, policy, snapshot, predict)
    if ask.pinned_level is not None:
        return _pinned(case, ask.pinned_level)  # (1)

    best = case.best(option for option in case.options if option.fits and option.facts.loadable)
    later = once_ready(case.options, case.bounds)
    if case.on_miss == "wait":
        better = case.best(option for option in later if case.worth_waiting(option, best))
        if better is not None:
            return case.wait(better, "waits")  # (2)
    target = case.best(later)
    if best is not None:
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
    if option.facts.loadable:
        return case.serve(option, "pinned")  # (1b); the pool makes room or refuses
    if option.barrier == "draining":
        reason = f"{level} is {BARRIERS['draining']}."
        return case.reject("busy", reason, retry=RETRY_SECONDS[0])  # (1c)
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
        return case.reject("busy", sentences.busy(case.options, retry), retry=retry)  # (7b)
    failed = min(case.failed(), key=_tried_again_in, default=None)
    if failed is not None:
        retry = _tried_again_in(failed)
        return case.reject("failed", sentences.failure(failed, retry), retry=retry)  # (7c)
    if target is not None:
        expected = case.policy.expected_requests
        return case.reject(
            "unmet", sentences.unpaid(target, case.seconds(target), expected)
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
    calm = Case.of(case.ask, case.policy, _idle(case.snapshot), case.predict)
    fits = {
        option.level
        for option in (*calm.options, *once_ready(calm.options, calm.bounds))
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
