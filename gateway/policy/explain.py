"""A decision as JSON: what `POST /v1/explain` and `pressgate explain` show. Pure."""

from __future__ import annotations

from typing import Any

from gateway.policy.decision import Ask, Decision, Verdict
from gateway.policy.policy import Policy
from gateway.variants.variant import LadderSnapshot, LevelFacts


def explanation(
    ask: Ask, policy: Policy, decision: Decision, snapshot: LadderSnapshot
) -> dict[str, Any]:
    """Inputs, the decision, and every level, in ladder order, with its numbers."""
    return {
        "object": "decision",
        "model": ask.model,
        "policy": decision.policy,
        "budget": dict(decision.budget.bounds()),
        "objective": decision.objective,
        "on_miss": ask.sla.on_miss or policy.on_miss,
        "prompt_tokens": ask.prompt_tokens,
        "max_tokens": ask.max_tokens,
        "decision": {
            "action": decision.action,
            "level": decision.level,
            "build": decision.build,
            "warm": decision.warm,
            "code": decision.code,
            "reason": decision.reason,
            "predicted": decision.predicted.numbers() if decision.predicted else None,
            "misses": list(decision.misses),
            "retry_after_s": decision.retry_after_s,
            "could_meet": decision.could_meet,
        },
        "levels": [
            _level(verdict, facts)
            for verdict, facts in zip(decision.verdicts, snapshot.levels, strict=True)
        ],
    }


def _level(verdict: Verdict, facts: LevelFacts) -> dict[str, Any]:
    return {
        "level": verdict.level,
        "family": facts.family,
        "state": verdict.state.value,
        "ok": verdict.ok,
        "why": verdict.why,
        "misses": list(verdict.misses),
        "predicted": verdict.predicted.numbers() if verdict.predicted else None,
        "estimated": verdict.estimated,
        "perplexity_ratio": facts.card.perplexity_ratio,
        "top1_agreement": facts.card.top1_agreement,
    }
