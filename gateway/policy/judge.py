"""Judges every level of a ladder against the bounds of one request. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from gateway.policy.budget import Bounds, Costs, excess
from gateway.policy.objective import Option
from gateway.policy.policy import Policy
from gateway.policy.predictor import Prediction
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

UNKNOWN_BUILD_SECONDS: Final = 60.0  # for a card that does not say

# Why a level cannot be used whatever it costs.
BARRIERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "levels": "not among the policy's levels",
        "failed": "failed",
        "draining": "being unloaded",
        "too_large": "larger than the memory for weights on this host",
        "host_memory": "no room beside the levels in use",
        "not_built": "not built, and the policy may not build it",
    }
)
PASSING: Final = frozenset({"draining", "host_memory"})  # barriers that time removes


def needs_build(facts: LevelFacts) -> bool:
    return facts.state in (State.ABSENT, State.BUILDING)


def costs(facts: LevelFacts, predicted: Prediction) -> Costs:
    """Every cost that a budget can bound, for one request at one level."""
    return Costs(
        ttft_ms=predicted.ttft_ms,
        tpot_ms=predicted.tpot_ms,
        latency_ms=predicted.latency_ms,
        memory_mb=predicted.memory_mb,
        max_ppl_ratio=facts.card.perplexity_ratio,
        min_agreement=facts.card.top1_agreement,
    )


def judge(
    bounds: Bounds, policy: Policy, snapshot: LadderSnapshot, predictions: Sequence[Prediction]
) -> tuple[Option, ...]:
    """One option per level, in ladder order. Loading counts in a level's times, building does not:
    an absent level is judged as it will be once it is in memory."""
    ranks = {level: rank for rank, level in enumerate(policy.levels)}
    room = _room(snapshot)
    options = []
    for index, (facts, prediction) in enumerate(zip(snapshot.levels, predictions, strict=True)):
        predicted = prediction.warmed() if needs_build(facts) else prediction
        options.append(
            Option(
                facts=facts,
                predicted=predicted,
                broken=excess(bounds, costs(facts, predicted)),
                rank=ranks.get(facts.level, len(ranks) + index),
                barrier=_barrier(facts, policy, snapshot.for_weights[0], room),
            )
        )
    return tuple(options)


def once_ready(options: Iterable[Option], bounds: Bounds) -> list[Option]:
    """The options not in memory yet that keep every bound once they are, priced as they will be."""
    ready = []
    for option in options:
        if option.barrier or option.facts.state is State.READY:
            continue
        predicted = option.predicted.warmed()
        if predicted is option.predicted:
            if not option.broken:
                ready.append(option)
        elif not excess(bounds, costs(option.facts, predicted)):
            ready.append(replace(option, predicted=predicted, broken={}))
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
        if facts.state is State.READY and not facts.leases
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
