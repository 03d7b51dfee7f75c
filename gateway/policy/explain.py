"""A decision as JSON: what `POST /v1/explain`, `GET /v1/decisions/{id}` and `pressgate explain`
show. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.policy.counterfactual import NO_FLOORS, counterfactuals, told
from gateway.policy.decision import Ask, Decision, Verdict
from gateway.policy.policy import Policy
from gateway.policy.prediction import Prediction
from gateway.variants.variant import LadderSnapshot, LevelFacts


def explanation(
    ask: Ask,
    policy: Policy,
    decision: Decision,
    snapshot: LadderSnapshot,
    floors: Mapping[str, float] = NO_FLOORS,
) -> dict[str, Any]:
    """Inputs, the decision, every level, in ladder order, with its numbers, and what other budgets
    would have got. Takes about half a millisecond per level.

    `floors`: the tightest times that the caller may ask for, by bound.
    """
    case = decision.case
    others = None
    if case is not None:
        others = told(counterfactuals(case, decision, floors), decision, case)
    return {
        "object": "decision",
        "model": ask.model,
        "policy": decision.policy,
        "sla": ask.sla.model_dump(mode="json", exclude_none=True),
        "budget": dict(decision.budget.bounds()),
        "objective": decision.objective,
        "on_miss": ask.sla.on_miss or policy.on_miss,
        "confidence": policy.confidence,
        "pinned": ask.pinned_level,
        "prompt_tokens": ask.prompt_tokens,
        "max_tokens": ask.max_tokens,
        "waited_ms": 0.0 if case is None else round(case.ask.moment.waited_ms, 1),
        "decision": outcome(decision, policy.confidence),
        "levels": [
            _level(verdict, facts, policy.confidence)
            for verdict, facts in zip(decision.verdicts, snapshot.levels, strict=True)
        ],
        "counterfactuals": others,
    }


def predicted(decision: Decision) -> Prediction | None:
    """What is predicted of a request from its arrival on: what it had waited for its turn before
    it was decided is added."""
    if decision.predicted is None or decision.case is None:
        return decision.predicted
    return decision.predicted.delayed(decision.case.ask.moment.waited_ms)


def outcome(decision: Decision, confidence: float) -> dict[str, Any]:
    """What was decided, without what it was decided on."""
    expected = predicted(decision)
    return {
        "action": decision.action,
        "level": decision.level,
        "build": decision.build,
        "warm": decision.warm,
        "code": decision.code,
        "reason": decision.reason,
        "predicted": None if expected is None else expected.numbers(confidence),
        "misses": list(decision.misses),
        "retry_after_s": decision.retry_after_s,
        "could_meet": decision.could_meet,
    }


def _level(verdict: Verdict, facts: LevelFacts, confidence: float) -> dict[str, Any]:
    expected = verdict.predicted
    return {
        "level": verdict.level,
        "family": facts.family,
        "state": verdict.state.value,
        "ok": verdict.ok,
        "why": verdict.why,
        "misses": list(verdict.misses),
        "predicted": None if expected is None else expected.numbers(confidence),
        "estimated": verdict.estimated,
        "perplexity_ratio": facts.card.perplexity_ratio,
        "top1_agreement": facts.card.top1_agreement,
    }
