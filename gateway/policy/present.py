"""The present of one ladder as arrays: what its engines do, patched from request to request.

Keeps what `predictor` needs of the levels and their learned tracks; decides and learns nothing. A
snapshot shares most `LevelFacts` with the one before it, so only rows that are other objects are
read again. Arrays that were handed out are replaced, never written to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, count
from operator import is_not
from typing import Final, Protocol

import numpy as np

from gateway.policy.columns import Columns, Floats, floats
from gateway.policy.lengths import Length
from gateway.policy.prediction import Predictions
from gateway.policy.quantile import MarginColumns, Margins
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

CHUNK_TOKENS: Final = 256  # prompt tokens between two turns of other work on the same cores
MAX_MS: Final = 3.6e9  # keeps absurd inputs finite
_STEPS: Final = 256  # batch sizes whose step times are kept per ladder


class Track(Protocol):
    """What is known of one level's speed."""

    @property
    def prefill_ms(self) -> float:
        """Per prompt token."""
        ...

    @property
    def load_ms(self) -> float: ...
    def step_ms(self, batch: int) -> float:
        """One decode step of `batch` sequences alone on the host."""
        ...

    def factors(self) -> tuple[float, float]:
        """The learned corrections of time to first token and time per token."""
        ...

    def margins(self) -> Margins:
        """What upper quantiles add."""
        ...


@dataclass(slots=True)
class _Busy:
    """A level with work. `full`: (sequences that must end first, mean tokens each has left,
    sequences running) when all its slots are taken."""

    running: int
    step_ms: float
    prompt_tokens: int
    prompt_ms: float
    full: tuple[int, float, int] | None


@dataclass(slots=True, eq=False)
class _Load:
    """Work of the whole host at one moment. `own_ms`: a step of each level with one sequence more;
    `decoding_ms`: a step as it is; `queued`: its prompt tokens not yet prefilled."""

    own_ms: Floats
    decoding_ms: Floats
    queued: Floats
    busy: Sequence[tuple[int, _Busy]] = ()
    step_ms: float = 0.0  # one decode step of every level of this ladder that decodes
    prompt_ms: float = 0.0  # prompts of this ladder not yet prefilled
    prompt_tokens: int = 0
    other_running: int = 0  # sequences of other models
    other_prompt_tokens: int = 0


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
        self._idle = self._steps_of(1)
        self._zeros = np.zeros(len(levels))
        self._own, self._decoding, self._queued = self._idle, self._zeros, self._zeros
        self._idle_bytes = 0.0
        self._steps: dict[int, Floats] = {1: self._idle}
        self._busy: dict[int, _Busy] = {}
        self._ttft_factor, self._tpot_factor = (
            np.array([t.factors()[which] for t in tracks], dtype=np.float64) for which in (0, 1)
        )
        self._margins = MarginColumns([track.margins() for track in tracks])
        self._cold = bool(self._load_ms.any())
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
        margins = list(self._margins.rows)
        margins[row] = self._tracks[row].margins()
        self._margins = MarginColumns(margins)

    def predict(
        self, prompt_tokens: int, max_tokens: int, snapshot: LadderSnapshot, length: Length
    ) -> Predictions:
        """What a request costs at every level beside all that runs; see `Predictor.predict`."""
        size, load = (prompt_tokens, max_tokens, length), self._load(snapshot)
        return self._predictions(size, load, self.columns, self._idle_bytes)

    # -- following --------------------------------------------------------------------------------

    def _patch(self, rows: Sequence[int]) -> None:
        own, decoding, queued = self._own.copy(), self._decoding.copy(), self._queued.copy()
        for row in rows:
            facts, track = self._levels[row], self._tracks[row]
            stats = facts.stats
            if not (stats.running or stats.waiting or stats.waiting_prompt_tokens):
                if self._busy.pop(row, None) is not None:
                    own[row], decoding[row], queued[row] = self._idle[row], 0.0, 0.0
                continue
            batch = stats.running + stats.waiting + 1
            own[row] = track.step_ms(min(batch, facts.max_running) if facts.max_running else batch)
            self._busy[row] = busy = _work(facts, track)
            decoding[row], queued[row] = busy.step_ms, busy.prompt_tokens
        self._own, self._decoding, self._queued = own, decoding, queued
        self._idle_bytes = self.columns.ready_bytes - sum(
            self._levels[row].card.resident_bytes
            for row in self.columns.ready_rows
            if self._levels[row].held
        )

    def _load(self, snapshot: LadderSnapshot) -> _Load:
        step = prompt = 0.0
        running = tokens = 0
        rows = sorted(self._busy.items())
        for _, busy in rows:
            step += busy.step_ms
            running += busy.running
            prompt += busy.prompt_ms
            tokens += busy.prompt_tokens
        return _Load(
            self._own,
            self._decoding,
            self._queued,
            rows,
            step,
            prompt,
            tokens,
            max(0, snapshot.host_running - running),
            max(0, snapshot.host_waiting_prompt_tokens - tokens),
        )

    def _steps_of(self, batch: int) -> Floats:
        return floats(track.step_ms(batch) for track in self._tracks)

    def _step_ms(self, batch: int) -> Floats:
        steps = self._steps.get(batch)
        if steps is None:
            if len(self._steps) >= _STEPS:
                self._steps.clear()
            steps = self._steps[batch] = self._steps_of(batch)
        return steps

    # -- predicting -------------------------------------------------------------------------------

    def _predictions(
        self, size: tuple[int, int, Length], load: _Load, columns: Columns, idle_bytes: float
    ) -> Predictions:
        prompt_tokens, max_tokens, length = size
        raw_ttft, raw_tpot = self._raw(prompt_tokens, load)
        ttft_factor, tpot_factor = self._ttft_factor, self._tpot_factor
        ttft = self._load_ms + np.minimum(MAX_MS, raw_ttft * ttft_factor)
        tpot = np.minimum(MAX_MS, raw_tpot * tpot_factor)

        def calm() -> Predictions:
            nobody = _Load(self._idle, self._zeros, self._zeros)
            settled = self.columns.settled
            return self._predictions(size, nobody, settled, settled.ready_bytes)

        return Predictions(
            columns=columns,
            idle_bytes=idle_bytes,
            ttft_ms=ttft,
            tpot_ms=tpot,
            latency_ms=ttft + (length.expected - 1.0) * tpot,
            memory_mb=(columns.resident + columns.kv * (prompt_tokens + max_tokens)) / 1e6,
            load_ms=self._load_ms,
            build_ms=self._build_ms,
            ttft_factor=ttft_factor,
            tpot_factor=tpot_factor,
            calm=calm,
            cold=self._cold,
            length=length,
            margins=self._margins,
        )

    def _raw(self, prompt_tokens: int, load: _Load) -> tuple[Floats, Floats]:
        """Uncorrected (time to first token, time per token). What nobody causes is not computed:
        adding zeros would give the same numbers."""
        raw_tpot, others = load.own_ms, None
        if load.step_ms or load.other_running:
            others = np.maximum(0.0, load.step_ms - load.decoding_ms)
            if load.other_running:
                others = others + self._step_ms(load.other_running)
            raw_tpot = load.own_ms + others

        # A forward pass over a few tokens costs no less than a decode step.
        turns: Floats | int
        if load.prompt_tokens:
            tokens = load.queued + prompt_tokens
            work = np.maximum(tokens * self._prefill, load.own_ms)
            turns = np.ceil(tokens / CHUNK_TOKENS)
        else:
            work = np.maximum(prompt_tokens * self._prefill, load.own_ms)
            turns = math.ceil(prompt_tokens / CHUNK_TOKENS)
        raw_ttft = work
        if load.prompt_tokens or load.other_prompt_tokens:
            beside = (load.other_prompt_tokens - load.queued) * self._prefill
            elsewhere = np.maximum(0.0, load.prompt_ms + beside)
            raw_ttft = work + np.minimum(work, elsewhere)
        if others is not None:
            raw_ttft = raw_ttft + turns * (others + load.decoding_ms)
        return self._queue_for_slots(raw_ttft, raw_tpot, load), raw_tpot

    @staticmethod
    def _queue_for_slots(raw_ttft: Floats, raw_tpot: Floats, load: _Load) -> Floats:
        """All slots taken: everybody waiting, and this one, needs a running sequence to end."""
        full = [(row, busy.full) for row, busy in load.busy if busy.full is not None]
        if full:
            raw_ttft = raw_ttft.copy()
            for row, (before, left, running) in full:
                raw_ttft[row] += before * left * raw_tpot.item(row) / running
        return raw_ttft


def _work(facts: LevelFacts, track: Track) -> _Busy:
    stats = facts.stats
    full = None
    if facts.max_running and stats.running >= facts.max_running:
        left = stats.remaining_tokens / (stats.running + stats.waiting)
        full = (stats.waiting + 1, left, stats.running)
    return _Busy(
        running=stats.running,
        step_ms=track.step_ms(stats.running) if stats.running else 0.0,
        prompt_tokens=stats.waiting_prompt_tokens,
        prompt_ms=stats.waiting_prompt_tokens * track.prefill_ms,
        full=full,
    )
