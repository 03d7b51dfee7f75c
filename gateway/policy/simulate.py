"""A ladder that exists only in numbers: levels, queues, loads and builds at the cards' rates.

Event-driven and deterministic. The model is the predictor's: one host whose levels take turns, one
prompt prefilled at a time (sharing the cores evenly with decoding), decode batches per level, loads
and builds that take what the cards say, idle levels unloaded when a new one needs their memory.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from gateway.engine.base import EngineStats
from gateway.policy.columns import UNKNOWN_BUILD_SECONDS
from gateway.policy.predictor import GUESSED_PREFILL_MS, GUESSED_TPOT_MS
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

SLOTS: Final = 16  # sequences a level decodes at once when its facts do not say
_DUE_S: Final = 1e-6  # what is due within a microsecond is due: far above the rounding of a clock


@dataclass(slots=True)
class Job:
    """One request inside the simulated ladder. Times in seconds of simulated time."""

    arrived: float
    prompt_tokens: int
    output_tokens: int
    first: float = math.nan
    done: float = math.nan


@dataclass(slots=True)
class _Level:
    facts: LevelFacts
    state: State
    queued: deque[Job] = field(default_factory=deque)  # no slot yet, or the level is not ready
    prefilling: int = 0  # hold a slot, first token still to come
    decoding: list[tuple[float, int, Job]] = field(default_factory=list)  # heap by last step
    steps: float = 0.0  # decode steps done since the beginning
    prompt_tokens: int = 0  # not prefilled yet
    used: float = 0.0

    @property
    def slots(self) -> int:
        return self.facts.max_running or SLOTS

    @property
    def busy(self) -> int:
        return self.prefilling + len(self.decoding)

    def step_s(self) -> float:
        return (self.facts.card.tpot_ms(len(self.decoding)) or GUESSED_TPOT_MS) / 1000.0

    def prefill_s(self, tokens: int) -> float:
        return (self.facts.card.prefill_ms(tokens) or GUESSED_PREFILL_MS * tokens) / 1000.0

    def stats(self) -> EngineStats:
        left = sum(end - self.steps for end, _, _ in self.decoding)
        return EngineStats(
            running=len(self.decoding),
            waiting=len(self.queued) + self.prefilling,
            waiting_prompt_tokens=self.prompt_tokens,
            remaining_tokens=round(left) + sum(job.output_tokens for job in self.queued),
        )


class Ladder:
    """The simulated ladder. `advance` moves time; `serve`, `build` and `warm` change it.

    Args:
        start: the ladder at time 0. Its running sequences are not simulated.
        finished: called with the level and the job when a job ends.
    """

    def __init__(self, start: LadderSnapshot, finished: Callable[[str, Job], None]) -> None:
        self._start = start
        self._finished = finished
        self._levels = {
            facts.level: _Level(replace(facts, stats=EngineStats(), leases=0), _settled(facts))
            for facts in start.levels
        }
        loaded = sum(
            facts.card.resident_bytes
            for facts in start.levels
            if facts.state in (State.READY, State.LOADING, State.DRAINING)
        )
        self._weight_budget, self._weights_at_start = start.for_weights
        self._others = max(0, self._weights_at_start - loaded)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._prompts: deque[tuple[_Level, Job]] = deque()
        self._prompt_left = 0.0  # seconds of undisturbed work on the first prompt
        self._builds_end = 0.0
        self.now = 0.0
        for level in self._levels.values():
            if level.state is State.LOADING:
                self._load(level)
            elif level.state is State.BUILDING:
                self._start_build(level)

    def snapshot(self) -> LadderSnapshot:
        """What a decider may know now."""
        levels = tuple(
            replace(
                level.facts,
                state=level.state,
                stats=level.stats(),
                leases=level.busy + len(level.queued),
            )
            for level in self._levels.values()
        )
        weights = self._weights()
        return replace(
            self._start,
            levels=levels,
            memory_used=self._start.memory_used - self._weights_at_start + weights,
            weight_used=weights if self._start.weight_budget else 0,
            building=sum(level.state is State.BUILDING for level in self._levels.values()),
            host_running=sum(facts.stats.running for facts in levels),
            host_waiting_prompt_tokens=sum(f.stats.waiting_prompt_tokens for f in levels),
        )

    def serve(self, name: str, job: Job) -> None:
        """Queue a job at a level, which is loaded (or built first) when it is not in memory."""
        level = self._levels[name]
        level.queued.append(job)
        level.prompt_tokens += job.prompt_tokens
        self.warm(name)
        self._fill(level)

    def build(self, name: str) -> None:
        level = self._levels[name]
        if level.state is State.ABSENT:
            self._start_build(level)

    def warm(self, name: str) -> None:
        level = self._levels[name]
        self.build(name)
        if level.state is State.STORED:
            self._load(level)

    def advance(self, until: float) -> None:
        """Move time to `until`, through every event on the way."""
        while True:
            at = min(self._next_event(), until)
            self._flow(at - self.now)
            self.now = at
            if not self._happen() and at >= until:
                return

    def drain(self) -> None:
        """Advance until nothing is left to happen."""
        while (at := self._next_event()) < math.inf:
            self.advance(at)

    # -- time -------------------------------------------------------------------------------------

    def _turn(self) -> float:
        """Seconds in which every decoding level makes one step."""
        turn = sum(level.step_s() for level in self._levels.values() if level.decoding)
        return 2 * turn if self._prompts else turn

    def _prefill_speed(self) -> float:
        return 0.5 if any(level.decoding for level in self._levels.values()) else 1.0

    def _next_event(self) -> float:
        at = self._timers[0][0] if self._timers else math.inf
        if self._prompts:
            at = min(at, self.now + max(0.0, self._prompt_left) / self._prefill_speed())
        turn = self._turn()
        for level in self._levels.values():
            if level.decoding:
                at = min(at, self.now + max(0.0, level.decoding[0][0] - level.steps) * turn)
        return at

    def _flow(self, seconds: float) -> None:
        """Work goes on for a while in which nothing happens."""
        turn, speed = self._turn(), self._prefill_speed()
        for level in self._levels.values():
            if level.decoding:
                level.steps += seconds / turn
        if self._prompts:
            self._prompt_left -= seconds * speed

    def _happen(self) -> bool:
        """Do one thing that is due now; False when nothing is."""
        if self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()
            return True
        if self._prompts and self._prompt_left <= _DUE_S:
            self._first_token(*self._prompts.popleft())
            return True
        turn = self._turn()
        for level in self._levels.values():
            if level.decoding and (level.decoding[0][0] - level.steps) * turn <= _DUE_S:
                self._end(level, heapq.heappop(level.decoding)[2])
                return True
        return False

    # -- work -------------------------------------------------------------------------------------

    def _fill(self, level: _Level) -> None:
        """Give free slots of a ready level to the jobs that wait for them."""
        while level.state is State.READY and level.queued and level.busy < level.slots:
            job = level.queued.popleft()
            level.prefilling += 1
            self._prompts.append((level, job))
            if len(self._prompts) == 1:
                self._prompt_left = level.prefill_s(job.prompt_tokens)

    def _first_token(self, level: _Level, job: Job) -> None:
        level.prefilling -= 1
        level.prompt_tokens -= job.prompt_tokens
        job.first = self.now
        if self._prompts:
            following, next_job = self._prompts[0]
            self._prompt_left = following.prefill_s(next_job.prompt_tokens)
        if job.output_tokens > 1:
            last = level.steps + job.output_tokens - 1
            heapq.heappush(level.decoding, (last, next(self._numbers), job))
        else:
            self._end(level, job)

    def _end(self, level: _Level, job: Job) -> None:
        job.done = level.used = self.now
        self._finished(level.facts.level, job)
        self._fill(level)

    # -- loads and builds -------------------------------------------------------------------------

    def _start_build(self, level: _Level) -> None:
        """One build at a time, in the order they were wanted."""
        level.state = State.BUILDING
        seconds = level.facts.card.build_seconds or UNKNOWN_BUILD_SECONDS
        self._builds_end = max(self._builds_end, self.now) + seconds
        self._at(self._builds_end, lambda: self._built(level))

    def _built(self, level: _Level) -> None:
        level.state = State.STORED
        if level.queued:
            self._load(level)

    def _load(self, level: _Level) -> None:
        level.state = State.LOADING
        self._evict()
        self._at(self.now + level.facts.card.load_seconds, lambda: self._ready(level))

    def _ready(self, level: _Level) -> None:
        level.state, level.used = State.READY, self.now
        self._fill(level)

    def _evict(self) -> None:
        """Unload idle levels, least recently used first, until memory suffices."""
        idle = sorted(
            (
                level
                for level in self._levels.values()
                if level.state is State.READY and not level.busy and not level.queued
            ),
            key=lambda level: level.used,
        )
        for level in idle:
            if self._weights() <= self._weight_budget:
                return
            level.state = State.STORED

    def _weights(self) -> int:
        return self._others + sum(
            level.facts.card.resident_bytes
            for level in self._levels.values()
            if level.state in (State.READY, State.LOADING)
        )

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time, next(self._numbers), action))


def _settled(facts: LevelFacts) -> State:
    """The state a level starts in; one being unloaded is on disk."""
    return State.STORED if facts.state is State.DRAINING else facts.state
