"""The present of one ladder as arrays: what its engines do, patched from request to request.

Keeps what `predictor` needs of the levels and their learned tracks, and puts the causes of
`causes` together for all levels at once; decides and learns nothing. A snapshot shares most
`LevelFacts` with the one before it, so only rows that are other objects are read again. What was
handed out is replaced, never written to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress, count
from operator import is_not
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from gateway.engine.base import EngineStats
from gateway.policy.causes import (
    CHUNK_TOKENS,
    NOBODY,
    SLOTS,
    Arrivals,
    Beside,
    Busy,
    FirstToken,
    Host,
    Token,
)
from gateway.policy.columns import Columns, Floats, floats
from gateway.policy.lengths import Length
from gateway.policy.prediction import Predictions
from gateway.policy.quantile import MarginColumns
from gateway.policy.track import Track
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

MAX_MS: Final = 3.6e9  # keeps absurd inputs finite
_STEPS: Final = 256  # batch sizes whose step times are kept per ladder
_MOST: Final = np.array(MAX_MS)  # as an array, which numpy need not convert every time
_LEAST_SLOPE_MS: Final = 0.01  # what a further sequence adds to a step at least

NOTHING: Final[Mapping[int, Any]] = MappingProxyType({})

Weights = tuple[float, ...]
_Ms = TypeVar("_Ms", float, Floats)


class Size(NamedTuple):
    """One request."""

    prompt_tokens: int
    max_tokens: int
    length: Length


class Learned(NamedTuple):
    """What the levels of a host have in common: weights of the causes, and what comes in."""

    ttft: Weights
    tpot: Weights
    arrivals: Arrivals


class _Now(NamedTuple):
    """The load that one answer of `tokens` meets. `beside`: of the levels with work, what runs
    beside it; `others`, `other_prompt_tokens`: sequences and prompts of other models; `pressure`:
    see `Arrivals`."""

    tokens: float
    host: Host = NOBODY
    busy: Mapping[int, Busy] = NOTHING
    beside: Mapping[int, Beside] = NOTHING
    others: int = 0
    other_prompt_tokens: int = 0
    building: int = 0
    pressure: float = 0.0


class Present:
    """One ladder as it was in the last snapshot that `follow` was given."""

    def __init__(self, levels: tuple[LevelFacts, ...], tracks: Sequence[Track]) -> None:
        """`tracks`: one per level, in ladder order."""
        self.columns = Columns(levels)
        self._levels = levels
        self._tracks = tracks
        self._prefill = floats(track.prefill_ms for track in tracks)
        cold = (f.state is not State.READY for f in levels)
        self._load_ms = floats(t.load_ms * c for t, c in zip(tracks, cold, strict=True))
        self._build_ms = np.where(self.columns.unbuilt, self._load_ms, 0.0)
        self._cold = bool(self._load_ms.any())
        self._alone = self._steps_of(1)
        self._steps: dict[int, Floats] = {1: self._alone}
        self._alone_ms: list[float] = self._alone.tolist()
        self._prefill_ms: list[float] = self._prefill.tolist()
        self._busy: dict[int, Busy] = {}  # by row, in the ladder's order
        self._held = [False] * len(levels)
        self._batches: dict[int, Sequence[float]] = {}
        self._slope_ms, self._room_ms = self._capacity()
        self._ttft_factor, self._tpot_factor = (
            np.array([t.factors()[which] for t in tracks], dtype=np.float64) for which in (0, 1)
        )
        self._margins = MarginColumns([track.margins() for track in tracks])
        self._idle_bytes = float(self.columns.ready_bytes)
        self._patch(range(len(levels)))

    def follow(self, levels: tuple[LevelFacts, ...]) -> bool:
        """Take over a newer snapshot's levels; False when a new `Present` is needed for them."""
        if len(levels) != len(self._levels):
            return False
        changed = list(compress(count(), map(is_not, levels, self._levels)))
        if changed:
            if not self.columns.still(levels, changed):
                return False
            self._levels = levels
            self._patch(changed)
        return True

    def learned(self, level: str) -> None:
        """The track of a level has new factors."""
        row = self.columns.index.get(level)
        if row is None:
            return
        self._ttft_factor, self._tpot_factor = self._ttft_factor.copy(), self._tpot_factor.copy()
        self._ttft_factor[row], self._tpot_factor[row] = self._tracks[row].factors()
        self._margins = self._margins.replaced(row, self._tracks[row].margins())

    def renewed(self) -> None:
        """All tracks may promise something else."""
        self._margins = MarginColumns([track.margins() for track in self._tracks])

    def predict(self, size: Size, snapshot: LadderSnapshot, learned: Learned) -> Predictions:
        """What a request costs at every level beside all that runs; see `Predictor.predict`."""
        now = self._now(max(1.0, size.length.expected - 1.0), snapshot, learned.arrivals)
        return self._predictions(size, now, learned, self.columns, self._idle_bytes)

    # -- following --------------------------------------------------------------------------------

    def _patch(self, rows: Sequence[int]) -> None:
        known, moved, joined = self._busy.copy(), False, False
        for row in rows:
            facts = self._levels[row]
            stats = facts.stats
            if facts.held is not self._held[row]:
                self._held[row] = not self._held[row]
                moved = True
            if stats.running or stats.waiting or stats.waiting_prompt_tokens or facts.leases:
                joined = joined or row not in known
                known[row] = self._busy_with(row, facts, stats)
            else:
                known.pop(row, None)
        self._busy = dict(sorted(known.items())) if joined else known
        if moved:
            self._idle_bytes = self.columns.ready_bytes - sum(
                self._levels[row].card.resident_bytes
                for row in self.columns.ready_rows
                if self._held[row]
            )

    def _busy_with(self, row: int, facts: LevelFacts, stats: EngineStats) -> Busy:
        running, sequences = stats.running, stats.running + stats.waiting
        known = sequences and stats.remaining_tokens
        return Busy(  # by place, which is quicker
            running,
            sequences,
            stats.remaining_tokens / sequences if known else math.inf,
            max(0, facts.leases - sequences),
            facts.max_running or SLOTS,
            stats.waiting_prompt_tokens * self._prefill_ms[row],
            stats.waiting_prompt_tokens,
            stats.kv_total_blocks - stats.kv_used_blocks if stats.kv_total_blocks else math.inf,
            self._tracks[row].step_ms(running) if running else 0.0,
            self._alone_ms[row],
            self._batches.get(row) or self._batch(row),
        )

    def _capacity(self) -> tuple[float, float]:
        """(what one more sequence adds to a step, ms; what all that can run add), of what is in
        memory."""
        slopes, slots = [], 0
        for facts, track in zip(self._levels, self._tracks, strict=True):
            if facts.state is State.READY:
                slopes.append((track.step_ms(SLOTS) - track.step_ms(1)) / (SLOTS - 1))
                slots += _slots(facts)
        slope_ms = max(_LEAST_SLOPE_MS, sum(slopes) / max(1, len(slopes)))
        return slope_ms, slope_ms * max(1, slots)

    def _batch(self, row: int) -> Sequence[float]:
        """`Busy.batch` of one level, to be kept."""
        step_ms, slots = self._tracks[row].step_ms, _slots(self._levels[row])
        more = [max(0.0, step_ms(size) - step_ms(1)) for size in range(1, slots + 1)]
        known = self._batches[row] = (0.0, *more, more[-1])
        return known

    def _steps_of(self, batch: int) -> Floats:
        return floats(track.step_ms(batch) for track in self._tracks)

    def _step_ms(self, batch: int) -> Floats:
        steps = self._steps.get(batch)
        if steps is None:
            if len(self._steps) >= _STEPS:
                self._steps.clear()
            steps = self._steps[batch] = self._steps_of(batch)
        return steps

    def _now(self, tokens: float, snapshot: LadderSnapshot, arrivals: Arrivals) -> _Now:
        busy, host, beside = self._busy, NOBODY, NOTHING
        if busy:
            beside = {row: level.beside(tokens) for row, level in busy.items()}
            host = Host.of(busy.values(), beside.values())
        return _Now(
            tokens,
            host,
            busy,
            beside,
            max(0, snapshot.host_running - host.running),
            max(0, snapshot.host_waiting_prompt_tokens - host.queue_tokens),
            snapshot.building,
            arrivals.pressure(tokens, self._slope_ms) if arrivals.per_ms else 0.0,
        )

    # -- predicting -------------------------------------------------------------------------------

    def _predictions(
        self, size: Size, now: _Now, learned: Learned, columns: Columns, idle_bytes: float
    ) -> Predictions:
        ttft_factor, tpot_factor = self._ttft_factor, self._tpot_factor
        raw_ttft = self._raw_ttft(size.prompt_tokens, now, learned.ttft)
        raw_tpot = self._raw_tpot(now, learned.tpot)
        raw_ttft *= ttft_factor
        raw_tpot *= tpot_factor
        ttft, tpot = np.minimum(raw_ttft, _MOST), np.minimum(raw_tpot, _MOST)
        if self._cold:
            ttft += self._load_ms
        latency = tpot * (size.length.expected - 1.0)
        latency += ttft
        memory = columns.kv * float(size.prompt_tokens + size.max_tokens)
        memory += columns.resident
        memory /= 1e6

        def calm() -> Predictions:
            settled = self.columns.settled
            return self._predictions(size, _Now(now.tokens), learned, settled, settled.ready_bytes)

        def causes(row: int) -> tuple[FirstToken, Token]:
            return self._first(row, size.prompt_tokens, now), self._token(row, now)

        return Predictions(
            columns=columns,
            idle_bytes=idle_bytes,
            ttft_ms=ttft,
            tpot_ms=tpot,
            latency_ms=latency,
            memory_mb=memory,
            load_ms=self._load_ms,
            build_ms=self._build_ms,
            ttft_factor=ttft_factor,
            tpot_factor=tpot_factor,
            calm=calm,
            cold=self._cold,
            length=size.length,
            margins=self._margins,
            causes=causes,
        )

    def _raw_tpot(self, now: _Now, weights: Weights) -> Floats:
        """Uncorrected time per token. Levels without work differ only in a step of their own."""
        own, others, batches, streams, per_token, arrivals, prompts, builds = weights
        alone, host, pressure = self._alone, now.host, now.pressure
        slope = self._slope_ms * host.streams
        elsewhere: Floats | float = host.others_ms
        if now.others:
            elsewhere = elsewhere + self._step_ms(now.others)
        said = own * alone
        if host.others_ms or now.others:
            said += others * elsewhere
        if pressure:
            steps = alone + (elsewhere + host.batches_ms + slope)
            said += arrivals * self._arriving(pressure * steps)
        if now.building:
            said += builds * (now.building * alone)
        queue = prompts * (host.queue_ms / now.tokens)
        common = streams * host.streams + per_token
        said += batches * host.batches_ms + common + queue
        for row, beside in now.beside.items():
            step, rest, batch = self._shared(row, now, beside)
            mine = own * step + others * rest
            if pressure:
                mine += arrivals * self._arriving(pressure * (step + (rest + batch + slope)))
            if now.building:
                mine += builds * (now.building * step)
            said[row] = mine + (batches * batch + common + queue)
        return said

    def _shared(self, row: int, now: _Now, beside: Beside | None) -> tuple[float, float, float]:
        """Of one level: its own step, other levels' steps, what batches add; ms."""
        alone, host = self._alone_ms[row], now.host
        others, batches = host.others_ms, host.batches_ms
        if beside is not None:
            _, steps_ms, batch_ms, joined_ms = beside
            others = others - steps_ms if others > steps_ms else 0.0
            batches = (batches - batch_ms if batches > batch_ms else 0.0) + joined_ms
        if now.others:
            others += self._step_ms(now.others).item(row)
        return alone, others, batches

    def _token(self, row: int, now: _Now) -> Token:
        host = now.host
        alone, others, batches = self._shared(row, now, now.beside.get(row))
        steps = alone + (others + batches + self._slope_ms * host.streams)
        arrivals = self._arriving(now.pressure * steps)
        queue, builds = host.queue_ms / now.tokens, now.building * alone
        return Token(alone, others, batches, host.streams, 1.0, arrivals, queue, builds)

    def _arriving(self, more: _Ms) -> _Ms:
        """What arrives lengthens steps until all slots are taken."""
        return more / (1.0 + more / self._room_ms)

    def _raw_ttft(self, prompt_tokens: int, now: _Now, weights: Weights) -> Floats:
        """Uncorrected time to first token. A forward pass over a few tokens costs no less than a
        decode step."""
        constant, prompt, queued, beside, turns, streams, *_, unseen, builds = weights
        slot_turns, slot_streams = weights[6:8]
        host = now.host
        work = np.maximum(prompt_tokens * self._prefill, self._alone)
        said = work * prompt
        if host.queue_ms or now.other_prompt_tokens:
            elsewhere = host.queue_ms + now.other_prompt_tokens * self._prefill
            said += beside * np.minimum(work, elsewhere)
        chunks = -(-prompt_tokens // CHUNK_TOKENS)
        if now.others:
            said += turns * (chunks * (host.turn_ms + self._step_ms(now.others)))
        elif host.turn_ms:
            said += turns * (chunks * host.turn_ms)
        if now.building:
            said += builds * (now.building * work)
        rest = constant + unseen * host.unseen
        said += rest + streams * (chunks * (host.running + now.others))
        for row, busy in now.busy.items():
            if not busy.queue_tokens and not busy.rounds(prompt_tokens):
                continue  # a newcomer there waits for no more than anywhere else
            own, queue, others, parts, turn, running, rounds = self._waits(row, prompt_tokens, now)
            mine = prompt * own + beside * others + turns * (parts * turn)
            mine += builds * (now.building * own)
            mine += rest + streams * (parts * running)
            waits = slot_turns * (rounds * turn) + slot_streams * (rounds * running)
            said[row] = mine + (queued * queue + waits)
        return said

    def _waits(
        self, row: int, prompt_tokens: int, now: _Now
    ) -> tuple[float, float, float, int, float, int, float]:
        """Of one level: its own prompt, the prompts before it, those of others (ms); chunks, a turn
        between two of them (ms) and its sequences; turns to wait for a slot."""
        host, rate = now.host, self._prefill_ms[row]
        work, queue, tokens, rounds = prompt_tokens * rate, 0.0, prompt_tokens, 0.0
        busy = now.busy.get(row)
        if busy is not None:
            queue, tokens = busy.queue_ms, prompt_tokens + busy.queue_tokens
            rounds = busy.rounds(prompt_tokens)
        # Behind the prompts before it, a short one costs no step of its own.
        least, elsewhere = self._alone_ms[row] - queue, host.queue_ms - queue
        work = work if work >= least else least
        others = (elsewhere if elsewhere > 0.0 else 0.0) + now.other_prompt_tokens * rate
        turn, running = host.turn_ms, host.running
        if now.others:
            turn, running = turn + self._step_ms(now.others).item(row), running + now.others
        chunks, before = -(-tokens // CHUNK_TOKENS), work + queue
        others = others if others < before else before
        return work, queue, others, chunks, turn, running, rounds

    def _first(self, row: int, prompt_tokens: int, now: _Now) -> FirstToken:
        work, queue, others, chunks, turn, running, rounds = self._waits(row, prompt_tokens, now)
        return FirstToken(
            1.0,
            work,
            queue,
            others,
            chunks * turn,
            chunks * running,
            rounds * turn,
            rounds * running,
            now.host.unseen,
            now.building * work,
        )


def _slots(facts: LevelFacts) -> int:
    return facts.max_running or SLOTS
