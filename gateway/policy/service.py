"""What being served costs once a slot is there: how long it takes, when it has to begin. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gateway.policy import sentences
from gateway.policy.case import Case, first
from gateway.policy.decision import Ask, Decision
from gateway.policy.moment import CALM
from gateway.policy.prediction import Prediction
from gateway.variants.variant import LadderSnapshot, LevelFacts

_RETRY_S: Final = (1.0, 60.0)
_TIMES: Final = frozenset({"ttft_ms", "tpot_ms", "latency_ms"})


def alone(decision: Decision, level: str | None = None) -> Prediction | None:
    """What the decision predicts for its level (or another one), without the wait for a slot that
    it holds while the level is full: the prompt and a step, then tokens at the predicted pace."""
    case, level = decision.case, level or decision.level
    if case is None or level is None:
        return decision.predicted
    row = case.columns.index[level]
    predicted = decision.predicted
    if predicted is None or level != decision.level:
        predicted = case.option(row).predicted
    prompt_ms = case.columns.prefill_ms.item(row) * case.ask.prompt_tokens * predicted.ttft_factor
    ttft_ms = min(predicted.ttft_ms, predicted.load_ms + max(prompt_ms, predicted.tpot_ms))
    return replace(
        predicted,
        ttft_ms=ttft_ms,
        latency_ms=ttft_ms + predicted.latency_ms - predicted.ttft_ms,
    )


def nearest(decision: Decision) -> str | None:
    """The level that the decision's offer (`could_meet`) is about."""
    case = decision.case
    if decision.level is not None or case is None:
        return decision.level
    row = case.nearest(case.open & case.columns.loadable)
    return None if row is None else case.snapshot.levels[row].level


def of(decision: Decision, arrived: float) -> tuple[float, float]:
    """(seconds that a slot will be held, when service has to begin so that the decision's bounds
    are kept; inf: it keeps no such bound, or misses one knowingly)."""
    service = alone(decision)
    if service is None:
        return 1.0, math.inf
    hold_s = max(1e-3, service.latency_ms / 1000.0)
    if _TIMES & set(decision.misses):
        return hold_s, math.inf
    confidence = decision.case.policy.confidence if decision.case is not None else 0.5
    high = service.high(confidence)
    bounds = dict(decision.budget.bounds())
    spare = [
        bounds[name] - cost
        for name, cost in (("ttft_ms", high.ttft_ms), ("latency_ms", high.latency_ms))
        if name in bounds
    ]
    return hold_s, arrived + min(spare) / 1000.0 if spare else math.inf


def blocked(decision: Decision) -> bool:
    """Is it only for the promises of those who run that nothing serves now?"""
    case = decision.case
    if decision.code != "busy" or case is None or case.harmless is None:
        return False
    return not bool(case.harmless.all())


@dataclass(frozen=True, slots=True)
class Hope:
    """Where a request would be served once the present load has passed, and until when it may wait
    for that.

    Attributes:
        hold_s: how long its slots will be held then.
        start_by: when service has to begin, seconds of the clock of its arrival.
    """

    level: str
    hold_s: float
    start_by: float


def hope(decision: Decision, arrived: float) -> Hope | None:
    """What a request that is refused for the load alone can still wait for; None: nothing, or it
    has no deadline to wait until."""
    case = decision.case
    if decision.action != "reject" or decision.code != "busy" or case is None:
        return None
    calm = Case(replace(case.ask, moment=CALM), case.policy, case.snapshot, case.said.calm())
    row = first(calm.usable & calm.columns.ready, calm.order)
    if row is None:
        return None
    bounds, high = dict(calm.bounds), calm.judged
    spare_ms = [
        bounds[name] - column.item(row)
        for name, column in (("ttft_ms", high.ttft_ms), ("latency_ms", high.latency_ms))
        if name in bounds
    ]
    if not spare_ms:
        return None
    hold_s = max(1e-3, calm.said.latency_ms.item(row) / 1000.0)
    return Hope(case.snapshot.levels[row].level, hold_s, arrived + min(spare_ms) / 1000.0)


def beside(snapshot: LadderSnapshot, ahead: Mapping[str, int], ask: Ask) -> LadderSnapshot:
    """The ladder with those that its engines do not tell of: sequences on their way to a level, or
    waiting for one of its slots (`ahead`: all that hold or get one first). Taken to be as long as
    `ask`."""
    if not ahead:
        return snapshot
    found = snapshot.levels
    more = {
        row: _joined(facts, ahead[facts.level], ask)
        for row, facts in enumerate(found)
        if ahead.get(facts.level, 0) > _seen(facts)
    }
    if not more:
        return snapshot
    levels = tuple([more.get(row, facts) for row, facts in enumerate(found)])
    starting = sum(facts.stats.running - found[row].stats.running for row, facts in more.items())
    return replace(snapshot, levels=levels, host_running=snapshot.host_running + starting)


def _joined(facts: LevelFacts, together: int, ask: Ask) -> LevelFacts:
    stats, more = facts.stats, together - _seen(facts)
    slots = facts.max_running - stats.running if facts.max_running else more
    starting = min(more, max(0, slots))
    return replace(
        facts,
        stats=replace(
            stats,
            running=stats.running + starting,
            waiting=stats.waiting + more - starting,
            waiting_prompt_tokens=stats.waiting_prompt_tokens + starting * ask.prompt_tokens,
            remaining_tokens=stats.remaining_tokens + more * ask.max_tokens,
        ),
    )


def _seen(facts: LevelFacts) -> int:
    return facts.stats.running + facts.stats.waiting


def crowded(decision: Decision, last: Decision, wait_s: float, why: str | None = None) -> Decision:
    """A refusal of what would have been served, were there not those who wait before it.

    `last`: what would be decided on the same request if it came now, after everybody who has a
    deadline; a slot is free for it in `wait_s` seconds.
    """
    retry = min(_RETRY_S[1], max(_RETRY_S[0], wait_s))
    offer = last.case.could_meet() if last.case is not None else None
    refused = replace(
        decision,
        action="reject",
        code="busy",
        level=None,
        build=None,
        warm=None,
        predicted=None,
        misses=(),
        reason=sentences.crowded(why, retry),
        retry_after_s=retry,
        could_meet=offer,
    )
    level = last.level or decision.level
    return refused if level is None else behind(refused, level, wait_s)


def behind(refused: Decision, level: str, wait_s: float) -> Decision:
    """A refusal whose offer is relaxed as far as the line before the level's slots needs too."""
    met, service, case = refused.could_meet, alone(refused, level), refused.case
    if met is None or service is None or case is None:
        return refused
    met, high, wait_ms = dict(met), service.high(case.policy.confidence), 1000.0 * wait_s
    for name, cost in (("ttft_ms", high.ttft_ms), ("latency_ms", high.latency_ms)):
        if name in met:
            met[name] = max(met[name], math.ceil(10.0 * (wait_ms + cost) + 1.0) / 10.0)
    return replace(refused, could_meet=met)
