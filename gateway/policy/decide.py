"""Decides how one request is served: pure, deterministic, no clock, no I/O.

The decision tree (the code carries the numbers). A level *fits* when it keeps every bound of the
effective budget (request ∩ policy), stands behind no barrier (policy's levels, failed, draining,
host memory, may not be built, too much for the promises of running requests), and needs no build;
loading counts in its times. A level *would fit* when all that holds once it is in memory. Times are
kept when their upper quantile at the policy's confidence, counted from the request's arrival, is
within the bound. "Best" is the objective's order, over expected times.

    1. Pinned level: that level or nothing; bounds only report.
       1a. not in the ladder, not among the policy's levels, too large: reject. Failed: reject,
           retry when it is tried again.
       1b. loadable: serve it.
       1c. being unloaded, or too much for running promises: reject, retry soon.
       1d. to be built: wait for it, or reject when the policy says so or the build is too long.
    2. on_miss `wait`, and a level that would fit beats the best that fits in the objective itself,
       and waiting for its build breaks no bound and no `wait_ms`: wait for it.
    3. Some level fits: serve the best. A better one that would fit is prepared meanwhile, if that
       pays.
       3a. but stay with the level that requests of this kind got a moment ago, while it fits and
           the best is no clear gain (its times keep their bounds with less than 10 % to spare;
           objective latency: it is less than 10 % faster);
       3b. and do not unload a level for the best right after one was loaded, while a level in
           memory fits.
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

Preparing *pays* when expected requests × gain > seconds of preparing. Expected are as many as the
traffic of the policy lets expect, which begins as its `expected_requests`. The gain per request is
its predicted duration times the relative improvement of the objective, or its whole duration when
its promise would otherwise be broken. What the policy waits for need not pay.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Final

from gateway.policy import sentences
from gateway.policy.case import Case, first
from gateway.policy.decision import Action, Ask, Code, Decision, Predict, Verdict
from gateway.policy.judge import BARRIERS, PASSING
from gateway.policy.moment import CALM
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
    case = Case(ask, policy, snapshot, predict(ask.prompt_tokens, ask.max_tokens, snapshot))
    if ask.pinned_level is not None:
        return _pinned(case, ask.pinned_level)  # (1)

    best = first(case.usable, case.order)
    if case.on_miss == "wait":
        better = first(case.worth_waiting(best), case.warm_order)
        if better is not None:
            return case.wait(better, "waits")  # (2)
    target = first(case.later, case.warm_order) if case.standing.prospects else None
    if best is not None:
        level = case.steady(best)
        if level != best:
            return case.serve(level, "steady", better=best)  # (3a), (3b)
        return case.serve(best, "fits", case.improvement(target, best))  # (3)
    return _missed(case, target)  # (4)-(7)


def _pinned(case: Case, level: str) -> Decision:
    row = case.columns.index.get(level)
    if row is None:
        known = ", ".join(case.columns.index) or "empty"
        return case.reject("unknown_level", f"{level} is not in the ladder ({known}).")  # (1a)
    option = case.option(row)
    if option.barrier in REFUSED_PINS:
        reason = sentences.refused(option, case.policy.name)
        retry = _tried_again_in(option) if option.barrier == "failed" else None
        return case.reject(REFUSED_PINS[option.barrier], reason, retry=retry)  # (1a)
    if option.barrier == "draining" or case.harmful(row):
        why = "draining" if option.barrier == "draining" else "promises"
        reason = f"{level} is {BARRIERS[why]}."
        return case.reject("busy", reason, retry=RETRY_SECONDS[0])  # (1c)
    if option.facts.loadable:
        return case.serve(row, "pinned")  # (1b); the pool makes room or refuses
    if case.on_miss == "reject" or not case.within_wait[row]:
        return _to_build(case, row)  # (1d)
    return case.wait(row, "pinned")  # (1d)


def _missed(case: Case, target: int | None) -> Decision:
    """No level fits now. `target`: the best of those that would fit once in memory."""
    if case.on_miss == "wait":
        waitable = first(case.later & case.within_wait, case.warm_order)
        if waitable is not None and case.columns.unbuilt[waitable]:
            return case.wait(waitable, "waits")  # (4)
        if waitable is not None:
            return case.serve(waitable, "cold")  # (4)
    if case.on_miss == "nearest":
        near = case.nearest(case.honest & case.columns.loadable)
        if near is not None:
            return case.serve(near, "nearest", case.rescue(target))  # (5)
        near = case.nearest(case.honest & case.within_wait)
        if near is not None:
            return case.wait(near, "waits")  # (6)
    return _reject(case, target)  # (7)


def _reject(case: Case, target: int | None) -> Decision:
    levels = case.snapshot.levels
    under_way = target is not None and levels[target].state in (State.BUILDING, State.LOADING)
    if target is not None and (under_way or case.rescue(target) is not None):
        return _to_build(case, target)  # (7a)
    retry = _calm_in(case)
    if retry is not None:
        running = sum(facts.stats.running + facts.stats.waiting for facts in levels)
        harmful = case.harmless is not None and not case.harmless.any()
        reason = sentences.busy(running, retry, harmful=harmful)
        return case.reject("busy", reason, retry=retry)  # (7b)
    failed = min(case.failed(), key=_tried_again_in, default=None)
    if failed is not None:
        retry = _tried_again_in(failed)
        return case.reject("failed", sentences.failure(failed, retry), retry=retry)  # (7c)
    if target is not None:
        reason = sentences.unpaid(case.option(target), case.seconds(target), case.expected)
        return case.reject("unmet", reason)  # (7d)
    row = case.nearest(case.open)
    near = None if row is None else case.option(row)
    return case.reject("unmet", sentences.unmet(near, len(levels), case.bounds))  # (7d)


def _to_build(case: Case, row: int) -> Decision:
    seconds = max(RETRY_SECONDS[0], case.seconds(row))
    reason = sentences.to_build(case.option(row), seconds)
    return case.reject("building", reason, retry=seconds, prepare=row)


def _tried_again_in(failed: Option) -> float:
    return max(RETRY_SECONDS[0], failed.facts.retry_s)


def _calm_in(case: Case) -> float | None:
    """Seconds until the load that keeps every level from fitting may have passed; None: it is not
    the load."""
    calm = Case(replace(case.ask, moment=CALM), case.policy, case.snapshot, case.said.calm())
    then = (calm.fits | calm.later) & calm.columns.loadable
    waits = [
        (case.said.ttft_ms.item(row) - calm.said.ttft_ms.item(row)) / 1000.0
        for row in then.nonzero()[0].tolist()
        if not case.fits[row] and case.barrier(row) in ("", *PASSING)
    ]
    low, high = RETRY_SECONDS
    return min(high, max(low, min(waits))) if waits else None
