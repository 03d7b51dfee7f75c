"""A ladder with the shape of the measured one, and shorthands the policy tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gateway.engine.base import EngineStats
from gateway.policy.budget import Sla
from gateway.policy.decide import Ask, Decision, decide
from gateway.policy.moment import CALM, Moment
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

MB = 10**6


def card(
    mb: float, ratio: float, agreement: float, prefill: float, tpot: float, **more: Any
) -> Card:
    """`tpot`: ms per token alone; eight together take twice as long a step."""
    return Card(
        **{
            "measured": True,
            "resident_bytes": int(mb * MB),
            "perplexity_ratio": ratio,
            "top1_agreement": agreement,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": {"1": 1000 / tpot, "8": 8000 / (2 * tpot)},
            "build_seconds": 20.0,
            "load_seconds": 0.2,
            **more,
        }
    )


CARDS = {
    "fp32": card(68, 1.0, 1.0, 2000, 20),
    "bf16": card(34, 1.0002, 0.998, 4000, 10),
    "int8": card(20, 1.001, 0.99, 3000, 6),
    "int4": card(12, 1.055, 0.87, 1000, 4),
    "sparse24": card(22, 1.3, 0.6, 3500, 8),
}


def facts(level: str, state: State = State.READY, **more: Any) -> LevelFacts:
    base = LevelFacts(
        level=level, family="any", state=state, card=CARDS[level], kv_bytes_per_token=1000
    )
    return replace(base, **more)


def ladder(states: dict[str, State] | None = None, **more: Any) -> LadderSnapshot:
    """The whole ladder, ready unless `states` says otherwise; 1 GB of memory, nothing running."""
    states = states or {}
    levels = tuple(facts(level, states.get(level, State.READY)) for level in CARDS)
    base = LadderSnapshot(model="m", levels=levels, memory_budget=1000 * MB, memory_used=200 * MB)
    return replace(base, **more)


def with_level(snapshot: LadderSnapshot, level: str, **changes: Any) -> LadderSnapshot:
    levels = tuple(
        replace(entry, **changes) if entry.level == level else entry for entry in snapshot.levels
    )
    return replace(snapshot, levels=levels)


def busy(running: int, waiting: int = 0, prompt: int = 0, remaining: int = 0) -> EngineStats:
    return EngineStats(
        running=running,
        waiting=waiting,
        waiting_prompt_tokens=prompt,
        remaining_tokens=remaining,
    )


def choose(
    snapshot: LadderSnapshot,
    policy: Policy | None = None,
    *,
    prompt: int = 100,
    tokens: int = 100,
    pin: str | None = None,
    moment: Moment = CALM,
    **sla: Any,
) -> Decision:
    """By the expected times (confidence 0.5) where no policy is given."""
    ask = Ask("m", prompt, tokens, pin, Sla(**sla), moment)
    return decide(ask, policy or Policy(name="p", confidence=0.5), snapshot, Predictor().predict)
