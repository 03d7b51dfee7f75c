"""The engine proper, synchronous: variants, their schedulers and runners, one step at a time.

Owned and driven by one thread (`local` has the thread; tests drive it by hand), hence no locks. A
step runs the next variant that has work, in turn: plan → run → sample → text → events. KV memory is
split evenly over the distinct layouts of the loaded variants; variants of one layout share a pool.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from gateway.engine.attention import Layout, Pool
from gateway.engine.base import (
    BadPrompt,
    EngineError,
    EngineFailed,
    EngineStats,
    FinishReason,
    GenerationRequest,
    SequenceFailed,
    TokenEvent,
    TokenLogprob,
)
from gateway.engine.grammar import Matcher
from gateway.engine.kv_cache import BlockPool
from gateway.engine.kv_quant import make_pool
from gateway.engine.runner import Model, forward_logits
from gateway.engine.runners import StepRunner, make_runner
from gateway.engine.sampler import RowState, Scored, sample, score
from gateway.engine.scheduler import Chunk, Limits, Scheduler
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.text import TextStream
from gateway.engine.tokenizer import Tokenizer
from gateway.errors import ModelError, Unavailable

log = logging.getLogger(__name__)

_POOL_LIVES = 4  # a pool holds at most this many full batches of full contexts (reuse included)


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """Settings of a local runtime. `kv_bytes` bounds all KV pools, `threads` is torch's count."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    max_num_seqs: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 256
    block_size: int = 16
    kv_bytes: int = 256 * 2**20
    prefix_cache: bool = True


class Job:
    """One request inside the engine."""

    def __init__(
        self,
        variant: str,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        matcher: Matcher | None = None,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.seq = Tokens(
            variant=variant,
            prompt_length=len(request.prompt),
            max_tokens=sampling.max_tokens,
            tokens=list(request.prompt),
            no_reuse=request.prompt_logprobs,
        )
        self.row = RowState(sampling, request.prompt, matcher)
        self.text = TextStream(tokenizer.decode, request.prompt, sampling.stop)
        self.prompt_scores = [Scored(request.prompt[0])] if request.prompt_logprobs else []

    @property
    def scoring(self) -> bool:
        """Prompt tokens are still to be scored."""
        return self.request.prompt_logprobs and len(self.prompt_scores) < self.seq.prompt_length


Event = tuple[Job, TokenEvent | EngineError]


@dataclass(slots=True)
class _Group:
    """Variants of one KV layout: their pool and their scheduler."""

    layout: Layout
    tensors: Pool
    scheduler: Scheduler
    context: int
    members: dict[str, _Variant] = field(default_factory=dict)


@dataclass(slots=True)
class _Variant:
    model: Model
    runner: StepRunner
    tokenizer: Tokenizer
    group: _Group
    jobs: dict[int, Job] = field(default_factory=dict)  # by id of the job's sequence


class Core:
    """All variants of a process. Not thread-safe: one owner."""

    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self._groups: dict[Layout, _Group] = {}
        self._variants: dict[str, _Variant] = {}
        self._order: list[str] = []  # whose turn it is, first first
        self._loads = count()

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV pools."""
        return sum(group.tensors.nbytes for group in self._groups.values())

    @property
    def names(self) -> list[str]:
        """The loaded variants."""
        return list(self._variants)

    @property
    def busy(self) -> bool:
        return any(variant.jobs for variant in self._variants.values())

    def attach(self, name: str, model: Model, tokenizer: Tokenizer) -> list[Event]:
        """Add a variant; returns failures of sequences that a smaller pool can no longer hold.

        Raises:
            ModelError: the name is taken.
            Unavailable: the KV budget has no room for its layout.
        """
        if name in self._variants:
            raise ModelError(f"{name} is already loaded")
        events: list[Event] = []
        group = self._groups.get(model.layout)
        if group is None:
            group, events = self._new_group(model)
        runner = make_runner(model, group.tensors, max_batch=self._options.max_num_seqs)
        variant = _Variant(model, runner, tokenizer, group)
        group.members[name] = self._variants[name] = variant
        group.scheduler.open(name, identity=f"{name}#{next(self._loads)}")
        self._order.append(name)
        return events

    def detach(self, name: str) -> list[Event]:
        """Remove a variant; its sequences fail."""
        variant = self._variants.pop(name)
        self._order.remove(name)
        variant.group.scheduler.close(name)
        del variant.group.members[name]
        if not variant.group.members:
            del self._groups[variant.group.layout]
            self._share_out(len(self._groups))
        gone = EngineFailed(f"{name} was unloaded")
        return [(job, gone) for job in variant.jobs.values()]

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

    def stats(self, name: str) -> EngineStats:
        return self._variants[name].group.scheduler.stats(name)

    def logits(self, name: str, windows: Tensor) -> Tensor:
        """fp32 logits of whole windows (see `runner.forward_logits`), outside any schedule."""
        return forward_logits(self._variants[name].model, windows)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every book agrees (tests call it after every step)."""
        for group in self._groups.values():
            group.scheduler.check_integrity()
        assert self.kv_bytes <= self._options.kv_bytes
        for name, variant in self._variants.items():
            stats = self.stats(name)
            assert len(variant.jobs) == stats.running + stats.waiting

    def step(self) -> list[Event]:
        """Run one step of the next variant that has work."""
        for name in self._order:
            variant = self._variants[name]
            if variant.jobs:
                self._order.remove(name)
                self._order.append(name)
                return self._step(name, variant)
        return []

    def _step(self, name: str, variant: _Variant) -> list[Event]:
        try:
            return self._run(name, variant)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            log.exception("a step of %s failed; its sequences are lost", name)
            failure = SequenceFailed(f"{name}: {type(error).__name__}: {error}")
            jobs = list(variant.jobs.values())
            for job in jobs:
                self.cancel(job)
            return [(job, failure) for job in jobs]

    def _run(self, name: str, variant: _Variant) -> list[Event]:
        scheduler = variant.group.scheduler
        plan = scheduler.plan(name)
        logits: list[Tensor] = []
        jobs: list[Job] = []
        if plan.decode:
            logits.append(variant.runner.decode(plan.decode))
            for seq in plan.decode:
                scheduler.advance(seq, 1)
                jobs.append(variant.jobs[id(seq)])
        if plan.prefill:
            chunk_jobs = [variant.jobs[id(chunk.seq)] for chunk in plan.prefill]
            every = [job.scoring for job in chunk_jobs]
            found = variant.runner.prefill(plan.prefill, every)
            for chunk, job, rows in zip(plan.prefill, chunk_jobs, found, strict=True):
                if job.scoring:
                    _score_prompt(job, chunk, rows)
                if chunk.samples:
                    jobs.append(job)
                    logits.append(rows[-1:])
                scheduler.advance(chunk.seq, chunk.length)
        if not jobs:
            return []
        with torch.inference_mode():
            picked = sample(torch.cat(logits), [job.row for job in jobs])
        return [
            (job, self._accept(variant, job, scored))
            for job, scored in zip(jobs, picked, strict=True)
        ]

    def _accept(self, variant: _Variant, job: Job, scored: Scored) -> TokenEvent:
        """Append a sampled token and turn it into an event; ends the sequence where it must end."""
        seq, params = job.seq, job.request.sampling
        first = seq.generated == 0
        variant.group.scheduler.append(seq, scored.token)
        text, finish = self._advance_text(variant, job, scored.token)
        if finish is not None:
            self.cancel(job)
        tokenizer = variant.tokenizer
        return TokenEvent(
            text=text,
            token=scored.token,
            logprob=None if params.logprobs is None else _logprob(tokenizer, scored),
            finish_reason=finish,
            cached_tokens=seq.cached if first else 0,
            prompt_logprobs=(
                tuple(_logprob(tokenizer, s) for s in job.prompt_scores)
                if first and job.request.prompt_logprobs
                else None
            ),
        )

    def _advance_text(
        self, variant: _Variant, job: Job, token: int
    ) -> tuple[str, FinishReason | None]:
        params = job.request.sampling
        if token in variant.tokenizer.eos_ids and not params.ignore_eos:
            return job.text.flush()[0], "stop"
        text, stopped = job.text.push(token)
        if stopped:
            return text, "stop"
        matcher = job.row.matcher
        full = job.seq.generated >= job.seq.max_tokens
        if full or (matcher is not None and matcher.done):
            rest, stopped = job.text.flush()
            over = stopped or (matcher is not None and matcher.done)
            return text + rest, "stop" if over else "length"
        return text, None

    def _new_group(self, model: Model) -> tuple[_Group, list[Event]]:
        blocks = self._blocks(model.layout, model.context_length, len(self._groups) + 1)
        if blocks < 2 + model.layout.tail_blocks:
            raise Unavailable(
                f"the KV cache of {self._options.kv_bytes} bytes has no room for another layout"
            )
        events = self._share_out(len(self._groups) + 1)
        options = self._options
        tensors = make_pool(model.layout, blocks, options.block_size, options.device)
        limits = Limits(options.max_num_seqs, options.max_waiting, options.prefill_chunk)
        scheduler = Scheduler(self._books(model.layout, blocks), limits, model.layout.tail_blocks)
        group = _Group(model.layout, tensors, scheduler, model.context_length)
        self._groups[model.layout] = group
        return group, events

    def _share_out(self, shares: int) -> list[Event]:
        """Give every present layout its part of the KV budget; sequences are recomputed."""
        events: list[Event] = []
        for group in self._groups.values():
            blocks = max(
                2 + group.layout.tail_blocks, self._blocks(group.layout, group.context, shares)
            )
            if blocks == group.tensors.num_blocks:
                continue
            for seq in group.scheduler.replace_pool(self._books(group.layout, blocks)):
                job = group.members[seq.variant].jobs.pop(id(seq))
                events.append((job, SequenceFailed("the KV cache shrank below this sequence")))
            _release(group)
            group.tensors = make_pool(
                group.layout, blocks, self._options.block_size, self._options.device
            )
            for member in group.members.values():
                member.runner.bind(group.tensors)
        return events

    def _books(self, layout: Layout, blocks: int) -> BlockPool:
        size = layout.block_size(self._options.block_size)
        return BlockPool(blocks, size, reuse=self._options.prefix_cache)

    def _blocks(self, layout: Layout, context: int, shares: int) -> int:
        size = layout.block_size(self._options.block_size)
        affordable = self._options.kv_bytes // shares // layout.block_bytes(size)
        each = -(-context // size) + layout.tail_blocks
        useful = _POOL_LIVES * self._options.max_num_seqs * each + 1
        return min(affordable, useful)


def _release(group: _Group) -> None:
    """Let go of a pool's tensors before the next are made, so that both never exist at once."""
    for member in group.members.values():
        for slot in member.model.slots:
            slot.kv = None
    group.tensors.clear()


def _score_prompt(job: Job, chunk: Chunk, rows: Tensor) -> None:
    """Score the prompt tokens that follow the chunk's positions; `rows` is [length, vocab]."""
    stop = min(chunk.start + chunk.length + 1, job.seq.prompt_length)
    targets = job.seq.tokens[chunk.start + 1 : stop]
    # After a preemption the prompt runs again, in other chunks: skip what is scored already.
    known = len(job.prompt_scores) - (chunk.start + 1)
    if 0 <= known < len(targets):
        top = job.request.sampling.logprobs or 0
        job.prompt_scores += score(rows[known : len(targets)], targets[known:], top)


def _logprob(tokenizer: Tokenizer, scored: Scored) -> TokenLogprob:
    return TokenLogprob(
        token=scored.token,
        text=tokenizer.token_text(scored.token),
        logprob=scored.logprob,
        top=tuple((t, tokenizer.token_text(t), p) for t, p in scored.top),
    )
