"""The engine proper, synchronous: variants, their schedulers and runners, one step at a time.

Owned and driven by one thread (`local` has the thread; tests drive it by hand), hence no locks. A
step runs the next variant that has work, in turn: plan → launch → land. Launching computes logits
and picks tokens; landing reads the tokens and makes text and events of them. Where a runner can
start from tokens that only its device knows (`AheadRunner`), a step lands after the next one was
launched, so that the device never waits for the host (as vLLM's asynchronous scheduling and
SGLang's overlapped one). A sequence that turns out to be over has then run one row too many, whose
result is dropped and whose KV lies in blocks that only later launches may write.

Which variants share KV memory is the business of `groups`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor

from gateway.engine.base import (
    BadPrompt,
    EngineError,
    EngineFailed,
    EngineStats,
    SequenceFailed,
    TokenEvent,
)
from gateway.engine.device_sampler import upload
from gateway.engine.draw import Draw, launch
from gateway.engine.groups import Group, Groups, LocalOptions
from gateway.engine.job import Job
from gateway.engine.model import Model
from gateway.engine.runner import forward_logits
from gateway.engine.runners import AheadRunner, MixedRunner, StepRunner, make_runner
from gateway.engine.sampler import Scored
from gateway.engine.scheduler import Plan
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.speculate import Level, Speculator, enlist, make_speculator
from gateway.engine.tokenizer import Tokenizer
from gateway.errors import ModelError

__all__ = ["AheadRunner", "Core", "Event", "Job", "LocalOptions"]

log = logging.getLogger(__name__)


Event = tuple[Job, TokenEvent | EngineError]
MakeRunner = Callable[..., StepRunner]


@dataclass(slots=True)
class _Variant:
    name: str
    model: Model
    runner: StepRunner
    group: Group
    speculator: Speculator | None = None
    jobs: dict[int, Job] = field(default_factory=dict)  # by id of the job's sequence

    @property
    def drafting(self) -> bool:
        """Whether the next step may be a speculative one."""
        if self.speculator is None:
            return False
        return self.speculator.due([job.row for job in self.jobs.values()])

    @property
    def ahead(self) -> bool:
        """Whether the next step may be launched before the tokens of the last one are read."""
        return hasattr(self.runner, "decode_from") and not any(
            job.row.lockstep for job in self.jobs.values()
        )


@dataclass(slots=True)
class _Flight:
    """A step that was launched: whose tokens it picks, in the order of its rows."""

    variant: _Variant
    jobs: list[Job]
    draw: Draw


class Core:
    """All variants of a process. Not thread-safe: one owner."""

    def __init__(self, options: LocalOptions, make: MakeRunner = make_runner) -> None:
        """`make(model, pool, max_batch=…)` gives the runner of a variant."""
        self._options = options
        self._make = make
        self._groups = Groups(options)
        self._variants: dict[str, _Variant] = {}
        self._order: list[str] = []  # whose turn it is, first first
        self._flights: deque[_Flight] = deque()
        self._loads = count()
        self._turns = 0  # launches so far

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV pools."""
        return self._groups.nbytes

    @property
    def names(self) -> list[str]:
        """The loaded variants."""
        return list(self._variants)

    @property
    def busy(self) -> bool:
        return bool(self._flights) or any(variant.jobs for variant in self._variants.values())

    def attach(self, name: str, model: Model, tokenizer: Tokenizer) -> list[Event]:
        """Add a variant; returns failures of sequences that a smaller pool can no longer hold.

        Raises:
            ModelError: the name is taken.
            Unavailable: the KV budget has no room for its layout.
        """
        if name in self._variants:
            raise ModelError(f"{name} is already loaded")
        events = self._land(0)
        group, lost = self._groups.find(model)
        for seq in lost:
            job = self._variants[seq.variant].jobs.pop(id(seq))
            events.append((job, SequenceFailed("the KV cache shrank below this sequence")))
        runner = self._make(model, group.tensors, max_batch=self._options.max_num_seqs)
        speculator = make_speculator(
            self._options.speculate,
            Level(name, model, tokenizer, runner),
            group.scheduler,
            places=self._options.max_num_seqs,
        )
        variant = _Variant(name, model, runner, group, speculator)
        group.members[name] = self._variants[name] = variant
        self._enlist(group)
        group.scheduler.open(name, identity=f"{name}#{next(self._loads)}")
        self._order.append(name)
        return events

    def detach(self, name: str) -> list[Event]:
        """Remove a variant; its sequences fail."""
        events = self._land(0)
        variant = self._variants.pop(name)
        self._order.remove(name)
        variant.group.scheduler.close(name)
        self._groups.leave(variant.group, name)
        self._enlist(variant.group)
        gone = EngineFailed(f"{name} was unloaded")
        return events + [(job, gone) for job in variant.jobs.values()]

    def speculate(self, mode: str) -> None:
        """Change `engine.speculate` for all variants."""
        self._options = replace(self._options, speculate=mode)
        for variant in self._variants.values():
            if variant.speculator is not None:
                variant.speculator.mode = mode
        for group in self._groups:
            self._enlist(group)

    def _enlist(self, group: Group) -> None:
        """Tell the group's variants which of them may draft for which."""
        found = [v.speculator for v in self._variants.values() if v.group is group]
        enlist([speculator for speculator in found if speculator is not None])

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            EngineOverloaded: the queue is full.
            BadPrompt: the prompt can never fit the context or the KV cache.
            EngineFailed: its variant is not loaded.
        """
        variant = self._variants.get(job.seq.variant)
        if variant is None:
            raise EngineFailed(f"{job.seq.variant} is not loaded")
        room = variant.model.context_length - job.seq.prompt_length
        if room < 1:
            raise BadPrompt(
                f"the prompt has {job.seq.prompt_length} tokens, the context holds "
                f"{variant.model.context_length}"
            )
        job.seq.max_tokens = min(job.seq.max_tokens, room)
        variant.group.scheduler.add(job.seq)
        variant.jobs[id(job.seq)] = job

    def cancel(self, job: Job) -> None:
        """Drop a request, wherever it is. No effect on one that is over."""
        variant = self._variants.get(job.seq.variant)
        if variant is not None and variant.jobs.pop(id(job.seq), None) is job:
            variant.group.scheduler.finish(job.seq)

    def move(self, job: Job, name: str) -> tuple[int | None, list[Event]]:
        """Let variant `name` go on with a running request, on the KV that is there.

        Returns: (tokens of its answer so far, None when it cannot move; events of steps that had to
        land first).
        """
        events = self._land(0)
        old, new = self._variants.get(job.seq.variant), self._variants.get(name)
        if old is None or new is None or old is new or old.group is not new.group:
            return None, events
        if old.jobs.get(id(job.seq)) is not job or job.scoring:
            return None, events
        needed = job.seq.prompt_length + job.seq.max_tokens
        if needed > new.model.context_length or not old.group.scheduler.move(job.seq, name):
            return None, events
        new.jobs[id(job.seq)] = old.jobs.pop(id(job.seq))
        return job.seq.known, events

    def stats(self, name: str) -> EngineStats:
        return self._variants[name].group.scheduler.stats(name)

    def logits(self, name: str, windows: Tensor) -> Tensor:
        """fp32 logits of whole windows (see `runner.forward_logits`), outside any schedule."""
        return forward_logits(self._variants[name].model, windows, self._make)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every book agrees (tests call it after every step)."""
        for group in self._groups:
            group.scheduler.check_integrity()
        assert self.kv_bytes <= self._options.kv_bytes
        for name, variant in self._variants.items():
            stats = self.stats(name)
            assert len(variant.jobs) == stats.running + stats.waiting

    def step(self) -> list[Event]:
        """Launch a step of the next variant that has work, and land the one before it."""
        variant = self._next()
        if variant is None:
            return self._land(0)
        ahead = variant.ahead and not variant.drafting
        events = [] if ahead else self._land(0)
        before = len(self._flights)
        events += self._guarded(variant, lambda: self._launch(variant))
        launched = len(self._flights) - before
        return events + self._land(launched if ahead else 0)

    def _next(self) -> _Variant | None:
        for name in self._order:
            variant = self._variants[name]
            if variant.jobs:
                self._order.remove(name)
                self._order.append(name)
                return variant
        return None

    def _guarded(self, variant: _Variant, act: Callable[[], list[Event]]) -> list[Event]:
        """The events of `act`; if it fails, so do its variant's sequences, and nothing else."""
        try:
            return act()
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            log.exception("a step of %s failed; its sequences are lost", variant.name)
            failure = SequenceFailed(f"{variant.name}: {type(error).__name__}: {error}")
            jobs = list(variant.jobs.values())
            for job in jobs:
                self.cancel(job)
            return [(job, failure) for job in jobs]

    def _launch(self, variant: _Variant) -> list[Event]:
        """Plan and start a step; it is under way then, unless it picks no token."""
        scheduler = variant.group.scheduler
        plan = scheduler.plan(variant.name)
        self._turns += 1
        speculator = variant.speculator
        if plan.decode and not plan.prefill and speculator is not None and speculator.drafters:
            events = self._speculate(variant, speculator, plan.decode)
            if events is not None:
                return events
        logits, ends = self._forward(variant, plan)
        jobs = [variant.jobs[id(seq)] for seq in plan.decode]
        for seq in plan.decode:
            scheduler.advance(seq, 1)
        for chunk, rows in zip(plan.prefill, ends, strict=True):
            job = variant.jobs[id(chunk.seq)]
            if job.scoring:
                job.score_prompt(chunk, rows)
            if chunk.samples:
                jobs.append(job)
                logits.append(rows[-1:])
            scheduler.advance(chunk.seq, chunk.length)
        if jobs:
            with torch.inference_mode():
                draw = launch(logits, [job.row for job in jobs])
            for job in jobs:
                scheduler.foresee(job.seq)
            self._flights.append(_Flight(variant, jobs, draw))
        return []

    def _speculate(
        self, variant: _Variant, speculator: Speculator, batch: Sequence[Tokens]
    ) -> list[Event] | None:
        """Take a speculative step, if one pays now."""
        jobs = [variant.jobs[id(seq)] for seq in batch]
        rows = [job.row for job in jobs]
        if any(seq.pending for seq in batch):
            speculator.skip(self._turns, batch, rows)
            return None
        found = speculator.step(self._turns, batch, rows)
        events: list[Event] = []
        for job, tokens in zip(jobs, found or (), strict=found is not None):
            for scored in tokens:
                variant.group.scheduler.advance(job.seq, 1)
                event = self._accept(variant, job, scored)
                events.append((job, event))
                if event.finish_reason is not None:
                    break
        return events or None

    def _forward(self, variant: _Variant, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of a plan's decode batch, none or one tensor; and those of its chunks."""
        every = [variant.jobs[id(chunk.seq)].scoring for chunk in plan.prefill]
        if plan.decode and plan.prefill and hasattr(variant.runner, "mixed"):
            runner: MixedRunner = variant.runner  # type: ignore[assignment]  # it has `mixed`
            found = runner.mixed(plan.decode, plan.prefill, every)
            if found is not None:
                return [found[0]], found[1]
        logits = [self._decode(variant, plan.decode)] if plan.decode else []
        return logits, variant.runner.prefill(plan.prefill, every) if plan.prefill else []

    def _decode(self, variant: _Variant, batch: Sequence[Tokens]) -> Tensor:
        if not any(seq.pending for seq in batch):
            return variant.runner.decode(batch)
        (flight,) = self._flights  # nothing is launched over more than one step under way
        runner: AheadRunner = variant.runner  # type: ignore[assignment]  # see _Variant.ahead
        return runner.decode_from(batch, _last_tokens(batch, flight))

    def _land(self, left: int) -> list[Event]:
        """Read the tokens of all steps under way but the `left` newest."""
        events: list[Event] = []
        while len(self._flights) > left:
            flight = self._flights.popleft()
            read = partial(self._read, flight, events)
            events += self._guarded(flight.variant, read)
        return events

    def _read(self, flight: _Flight, events: list[Event]) -> list[Event]:
        """Add a flight's events to `events`, one by one: a failure must not lose those before."""
        variant = flight.variant
        for job, scored in zip(flight.jobs, flight.draw.collect(), strict=True):
            if variant.jobs.get(id(job.seq)) is job:  # else over or cancelled meanwhile
                events.append((job, self._accept(variant, job, scored)))
        return []

    def _accept(self, variant: _Variant, job: Job, scored: Scored) -> TokenEvent:
        """Append a sampled token and turn it into an event; ends the sequence where it must end."""
        variant.group.scheduler.append(job.seq, scored.token)
        event = job.take(scored)
        if event.finish_reason is not None:
            self.cancel(job)
        return event


def _last_tokens(batch: Sequence[Tokens], flight: _Flight) -> Tensor:
    """int64 [batch] on the device: from the flight where they are pending, else from the host."""
    tokens = flight.draw.tokens
    if len(batch) == len(flight.jobs) and all(
        job.seq is seq for job, seq in zip(flight.jobs, batch, strict=True)
    ):
        return tokens
    rows = {id(job.seq): row for row, job in enumerate(flight.jobs)}
    known = [seq.tokens[-1] for seq in batch if not seq.pending]
    after = iter(range(len(rows), len(rows) + len(known)))
    index = [rows[id(seq)] if seq.pending else next(after) for seq in batch]
    device = tokens.device
    choice = torch.cat([tokens, upload(known, torch.long, device)]) if known else tokens
    return choice[upload(index, torch.long, device)]
