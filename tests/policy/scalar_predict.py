"""The prediction written level by level, in plain Python: the oracle of the columnar one.

It follows the causes that `gateway.policy.causes` names, from the snapshot's own numbers, with one
level at a time and no arrays. What is learned is shared with the real predictor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.policy.causes import CHUNK_TOKENS, SLOTS
from gateway.policy.lengths import Length
from gateway.policy.prediction import Prediction
from gateway.policy.predictor import Predictor
from gateway.policy.present import MAX_MS
from gateway.variants.variant import LadderSnapshot, LevelFacts, State


class ScalarPredictor(Predictor):
    """Learns as the real one does, and predicts level by level."""

    def each(
        self,
        prompt_tokens: int,
        max_tokens: int,
        snapshot: LadderSnapshot,
        per_ms: float = 0.0,
    ) -> tuple[Prediction, ...]:
        tracks = [self._track(snapshot.model, facts) for facts in snapshot.levels]
        tokens = max(1.0, float(max_tokens) - 1.0)
        host = _Host.of(snapshot, tracks, tokens, self._pressure(snapshot, tracks, tokens, per_ms))
        weights = self._of(snapshot.model).learned(per_ms)
        return tuple(
            _predict(facts, track, host, (prompt_tokens, max_tokens), weights)
            for facts, track in zip(snapshot.levels, tracks, strict=True)
        )

    def _pressure(
        self, snapshot: LadderSnapshot, tracks: Sequence[Any], tokens: float, per_ms: float
    ) -> tuple[float, float, float]:
        """(pressure of arrivals, ms that one more sequence adds to a step, ms that all can)."""
        ready = [
            (facts, track)
            for facts, track in zip(snapshot.levels, tracks, strict=True)
            if facts.state is State.READY
        ]
        slopes = [(track.step_ms(SLOTS) - track.step_ms(1)) / (SLOTS - 1) for _, track in ready]
        slope = max(0.01, sum(slopes) / max(1, len(slopes)))
        room = slope * max(1, sum(facts.max_running or SLOTS for facts, _ in ready))
        if not per_ms:
            return 0.0, slope, room
        usual = self._of(snapshot.model).arrivals
        life = usual.tokens or tokens
        stay = tokens / 2.0 if tokens <= life else life * (1.0 - life / (2.0 * tokens))
        share = min(0.9, per_ms * (slope * stay + usual.prefill_ms))
        return share / (1.0 - share), slope, room


@dataclass(frozen=True, slots=True)
class _Host:
    """Work of the whole host at one moment, computed once for all levels."""

    tokens: float
    others_ms: float
    batches_ms: float
    streams: float
    turn_ms: float
    running: int
    queue_ms: float
    unseen: int
    other_running: int
    other_prompt_tokens: int
    building: int
    arrivals: tuple[float, float, float]

    @classmethod
    def of(
        cls,
        snapshot: LadderSnapshot,
        tracks: Sequence[Any],
        tokens: float,
        arrivals: tuple[float, float, float],
    ) -> _Host:
        others = batches = streams = turn = queue = 0.0
        running = unseen = queued = 0
        for facts, track in zip(snapshot.levels, tracks, strict=True):
            stats = facts.stats
            company = _company(facts, tokens)
            others += min(1.0, company) * track.step_ms(1)
            batches += _batch_ms(facts, track, company)
            streams += company
            turn += track.step_ms(stats.running) if stats.running else 0.0
            running += stats.running
            queue += stats.waiting_prompt_tokens * track.prefill_ms
            queued += stats.waiting_prompt_tokens
            unseen += max(0, facts.leases - stats.running - stats.waiting)
        return cls(
            tokens,
            others,
            batches,
            streams,
            turn,
            running,
            queue,
            unseen,
            max(0, snapshot.host_running - running),
            max(0, snapshot.host_waiting_prompt_tokens - queued),
            snapshot.building,
            arrivals,
        )


def _company(facts: LevelFacts, tokens: float) -> float:
    """Sequences of the level that run, on average over an answer of `tokens`."""
    stats = facts.stats
    count = stats.running + stats.waiting
    unseen = 0.5 * max(0, facts.leases - count)
    if not count:
        return unseen
    share = 1.0
    if stats.remaining_tokens:
        ratio = stats.remaining_tokens / count / tokens
        share = ratio if ratio <= 0.5 else 1.0 - 0.25 / ratio
    return min(float(facts.max_running or SLOTS), share * count) + unseen


def _batch_ms(facts: LevelFacts, track: Any, company: float) -> float:
    """What a batch of `company` adds to a step of one; fractions are interpolated."""

    def more(size: int) -> float:
        return max(0.0, float(track.step_ms(size) - track.step_ms(1))) if size else 0.0

    slots = facts.max_running or SLOTS
    if company >= slots:
        return more(slots)
    low = math.floor(company)
    return more(low) + (company - low) * (more(low + 1) - more(low))


def _predict(
    facts: LevelFacts, track: Any, host: _Host, size: tuple[int, int], learned: Any
) -> Prediction:
    prompt_tokens, max_tokens = size
    load_ms = 0.0 if facts.state is State.READY else track.load_ms
    ttft_factor, tpot_factor = track.ttft.factor, track.tpot.factor
    first = _first_ms(facts, track, host, prompt_tokens, learned.ttft)
    ttft = load_ms + min(MAX_MS, first * ttft_factor)
    tpot = min(MAX_MS, _token_ms(facts, track, host, learned.tpot) * tpot_factor)
    kv_bytes = facts.kv_bytes_per_token * (prompt_tokens + max_tokens)
    length = Length.certain(max_tokens)
    return Prediction(
        ttft_ms=ttft,
        tpot_ms=tpot,
        latency_ms=ttft + (length.expected - 1.0) * tpot,
        memory_mb=(facts.card.resident_bytes + kv_bytes) / 1e6,
        load_ms=load_ms,
        ttft_factor=ttft_factor,
        tpot_factor=tpot_factor,
        length=length,
        margins=track.margins(),
    )


def _token_ms(facts: LevelFacts, track: Any, host: _Host, weights: Sequence[float]) -> float:
    alone, company = track.step_ms(1), _company(facts, host.tokens)
    others, batches = host.others_ms, host.batches_ms
    if company:
        others = max(0.0, others - min(1.0, company) * alone)
        batches = max(0.0, batches - _batch_ms(facts, track, company))
        batches += _batch_ms(facts, track, 1.0 + company)
    if host.other_running:
        others += track.step_ms(host.other_running)
    said: float = weights[0] * alone + weights[1] * others
    pressure, slope, room = host.arrivals
    if pressure:
        more = pressure * (alone + (others + batches + slope * host.streams))
        said += weights[5] * (more / (1.0 + more / room))
    said += weights[7] * (host.building * alone)
    common = weights[3] * host.streams + weights[4]
    return said + (weights[2] * batches + common + weights[6] * (host.queue_ms / host.tokens))


def _first_ms(
    facts: LevelFacts, track: Any, host: _Host, prompt_tokens: int, weights: Sequence[float]
) -> float:
    stats = facts.stats
    queue: float = stats.waiting_prompt_tokens * track.prefill_ms
    # A forward pass over a few tokens costs no less than a decode step.
    work = max(prompt_tokens * track.prefill_ms, track.step_ms(1) - queue)
    elsewhere = max(0.0, host.queue_ms - queue) + host.other_prompt_tokens * track.prefill_ms
    chunks = math.ceil((prompt_tokens + stats.waiting_prompt_tokens) / CHUNK_TOKENS)
    turn, running = host.turn_ms, host.running + host.other_running
    if host.other_running:
        turn += track.step_ms(host.other_running)
    rounds = _rounds(facts, prompt_tokens)
    said: float = weights[1] * work + weights[3] * min(work + queue, elsewhere)
    said += weights[4] * (chunks * turn)
    said += weights[9] * (host.building * work)
    said += (weights[0] + weights[8] * host.unseen) + weights[5] * (chunks * running)
    waits = weights[6] * (rounds * turn) + weights[7] * (rounds * running)
    return said + (weights[2] * queue + waits)


def _rounds(facts: LevelFacts, prompt_tokens: int) -> float:
    """All slots or KV blocks taken: everybody waiting, and this one, needs a sequence to end."""
    stats, slots = facts.stats, facts.max_running or SLOTS
    count = stats.running + stats.waiting
    tight = stats.kv_total_blocks and (
        16 * (stats.kv_total_blocks - stats.kv_used_blocks) < prompt_tokens
    )
    if not count or not stats.remaining_tokens or (count < slots and not tight):
        return 0.0
    before = max(1, count + 1 - slots)
    return before * (stats.remaining_tokens / count) / max(1, min(stats.running, slots))
