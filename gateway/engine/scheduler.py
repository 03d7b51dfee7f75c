"""Which tokens run next: queues, chunked prefill, decode batches, preemption. Torch-free, no clock.

One `Scheduler` decides for all variants that share one KV pool, so that blocks go to the oldest
request whatever its level. It plans; `local` runs the plan and reports back. A sequence's life:

    add → waiting → plan (admit: blocks for all its tokens, prefix reused) → running
        → plan/advance/append … → finish (or cancel, or preempt → waiting)

Every step of one variant, `plan` decides in this order:
1. every running sequence with one token left to compute decodes; if it needs a block and none is
   left, the youngest running sequence on the pool is preempted (recomputed later), in the end
   itself;
2. waiting sequences are admitted oldest first while places and blocks last; nobody overtakes an
   older sequence of another variant that waits for blocks;
3. sequences with more than one token left prefill, oldest first, together at most `prefill_chunk`
   tokens: decoding sequences wait for one chunk at most, never for a whole prompt.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from gateway.engine.base import BadPrompt, EngineOverloaded, EngineStats
from gateway.engine.kv_cache import BlockPool, Key, chain_key, root_key


@dataclass(frozen=True, slots=True)
class Limits:
    """Per variant. `prefill_chunk` is in tokens per step."""

    max_num_seqs: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 256


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and where they are.

    `tokens` is prompt and output; `computed` counts those whose KV is in `blocks`; `tail` are
    blocks it works in besides; `no_reuse` makes the whole prompt be computed (its logits are
    wanted).
    """

    variant: str
    prompt_length: int
    max_tokens: int
    tokens: list[int]
    no_reuse: bool = False
    arrival: int = -1
    computed: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens [start, start + length) of `seq`. It samples when that reaches its end."""

    seq: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        return self.start + self.length == len(self.seq.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step of one variant: a decode batch (one token each) and prefill chunks."""

    decode: tuple[Sequence, ...] = ()
    prefill: tuple[Chunk, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


@dataclass(slots=True)
class _Queues:
    root: Key
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    hit_tokens: int = 0


def _arrival(seq: Sequence) -> int:
    return seq.arrival


class Scheduler:
    """Owner of the sequences of every variant on one pool. Single-threaded.

    Every running sequence holds `tail_blocks` blocks besides those of its tokens.
    """

    def __init__(self, pool: BlockPool, limits: Limits, tail_blocks: int = 0) -> None:
        self.pool = pool
        self._limits = limits
        self._tail = tail_blocks
        self._queues: dict[str, _Queues] = {}
        self._arrivals = count()

    def open(self, variant: str, *, identity: str) -> None:
        """Accept sequences of `variant`; `identity` (unique per load) roots its prefix keys."""
        self._queues[variant] = _Queues(root_key(identity))

    def close(self, variant: str) -> list[Sequence]:
        """Forget a variant; returns the sequences that were still there, their blocks freed."""
        queues = self._queues.pop(variant)
        for seq in queues.running:
            self._free(seq)
        return [*queues.running, *queues.waiting]

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; `max_tokens` is cut to what the pool can ever hold.

        Raises:
            BadPrompt: the prompt can never fit.
            EngineOverloaded: its variant has as many sequences as may run and wait.
        """
        queues = self._queues[seq.variant]
        places = self._limits.max_num_seqs + self._limits.max_waiting
        if not self._fit(seq):
            raise BadPrompt(
                f"a prompt of {seq.prompt_length} tokens does not fit the KV cache "
                f"({self.capacity} tokens)"
            )
        if len(queues.running) + len(queues.waiting) >= places:
            raise EngineOverloaded(f"{len(queues.waiting)} requests are waiting")
        seq.arrival = next(self._arrivals)
        queues.waiting.append(seq)

    def has_work(self, variant: str) -> bool:
        queues = self._queues[variant]
        return bool(queues.running or queues.waiting)

    def plan(self, variant: str) -> Plan:
        """Decide the next step of `variant` (see the module's rules 1-3)."""
        queues = self._queues[variant]
        for seq in tuple(queues.running):  # (1)
            if seq.blocks and seq.left == 1:
                self._grow(seq)
        self._admit(queues)  # (2)
        decode = tuple(seq for seq in queues.running if seq.left == 1)
        budget = self._limits.prefill_chunk
        prefill = []
        for seq in queues.running:  # (3)
            if seq.left > 1 and budget > 0:
                length = min(seq.left, budget)
                prefill.append(Chunk(seq, seq.computed, length))
                budget -= length
        return Plan(decode, tuple(prefill))

    def advance(self, seq: Sequence, computed: int) -> None:
        """Tell that `computed` more tokens of `seq` are in the pool."""
        size = self.pool.block_size
        before, seq.computed = seq.computed // size, seq.computed + computed
        self._extend_keys(seq, seq.computed // size)
        for index in range(before, seq.computed // size):
            self.pool.store(seq.blocks[index], seq.keys[index])

    def append(self, seq: Sequence, token: int) -> None:
        """Add a sampled token; it is computed in a later step."""
        seq.tokens.append(token)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence wherever it is (finished or cancelled) and free its blocks."""
        queues = self._queues.get(seq.variant)
        if queues is None:
            return
        for group in (queues.running, queues.waiting):
            if seq in group:
                group.remove(seq)
        self._free(seq)

    def preempt_all(self) -> None:
        """Send every running sequence back to wait and forget all reusable blocks."""
        for queues in self._queues.values():
            for seq in tuple(queues.running):
                self._preempt(seq)
        self.pool.drop_cached()

    def replace_pool(self, pool: BlockPool) -> list[Sequence]:
        """Go on with another (empty) pool; returns sequences that can never fit it, removed."""
        self.preempt_all()
        self.pool = pool
        lost = [
            seq for queues in self._queues.values() for seq in queues.waiting if not self._fit(seq)
        ]
        for seq in lost:
            self.finish(seq)
        return lost

    def stats(self, variant: str) -> EngineStats:
        queues = self._queues[variant]
        everyone = [*queues.running, *queues.waiting]
        return EngineStats(
            running=len(queues.running),
            waiting=len(queues.waiting),
            waiting_prompt_tokens=sum(seq.left for seq in everyone if seq.left > 1),
            remaining_tokens=sum(seq.max_tokens - seq.generated for seq in everyone),
            kv_used_blocks=self.pool.used,
            kv_total_blocks=self.pool.total,
            prefix_hit_tokens=queues.hit_tokens,
            preemptions=queues.preemptions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, sequences and pool agree."""
        self.pool.check_integrity(seq.blocks + seq.tail for seq in self._running())
        for queues in self._queues.values():
            assert len(queues.running) <= self._limits.max_num_seqs
            assert queues.running == sorted(queues.running, key=_arrival)
            assert queues.waiting == sorted(queues.waiting, key=_arrival)
            assert not set(map(id, queues.running)) & set(map(id, queues.waiting))
            for seq in queues.waiting:
                assert not seq.blocks
                assert not seq.tail
                assert seq.computed == 0
            for seq in queues.running:
                assert 0 <= seq.computed <= len(seq.tokens)
                assert len(seq.blocks) >= self._blocks_for(seq.computed)
                assert len(seq.tail) == self._tail

    @property
    def capacity(self) -> int:
        """Tokens the pool holds when one sequence has it alone."""
        return (self.pool.total - self._tail) * self.pool.block_size

    def _fit(self, seq: Sequence) -> bool:
        """Cut `max_tokens` to the pool; False if not even one more token fits."""
        seq.max_tokens = min(seq.max_tokens, self.capacity - seq.prompt_length)
        return seq.generated < seq.max_tokens

    def _running(self) -> Iterator[Sequence]:
        return (seq for queues in self._queues.values() for seq in queues.running)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _grow(self, seq: Sequence) -> None:
        """Give `seq` blocks for all its tokens, preempting the youngest until there are enough."""
        missing = self._blocks_for(len(seq.tokens)) - len(seq.blocks)
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                seq.blocks += blocks
                return
            victim = max(self._running(), key=_arrival)
            self._preempt(victim)
            if victim is seq:
                return

    def _admit(self, queues: _Queues) -> None:
        while queues.waiting and len(queues.running) < self._limits.max_num_seqs:
            seq = queues.waiting[0]
            if self._older_waits_for_blocks(seq):
                return
            reused = self._reusable(seq)
            missing = self._blocks_for(len(seq.tokens)) - len(reused) + self._tail
            if missing + self.pool.idle(reused) > self.pool.available:
                return
            self.pool.hold(reused)
            blocks = self.pool.allocate(missing)
            assert blocks is not None, "availability was checked"
            seq.tail, seq.blocks = blocks[: self._tail], reused + blocks[self._tail :]
            seq.computed = len(reused) * self.pool.block_size
            if seq.generated == 0:
                seq.cached = seq.computed
                queues.hit_tokens += seq.cached
            queues.waiting.pop(0)
            insort(queues.running, seq, key=_arrival)

    def _older_waits_for_blocks(self, seq: Sequence) -> bool:
        heads = (
            queues.waiting[0]
            for queues in self._queues.values()
            if queues.waiting and len(queues.running) < self._limits.max_num_seqs
        )
        return any(
            head.arrival < seq.arrival
            and self._blocks_for(len(head.tokens)) + self._tail > self.pool.available
            for head in heads
        )

    def _reusable(self, seq: Sequence) -> list[int]:
        """Stored blocks of the sequence's prefix; at least its last token stays to be computed."""
        if seq.no_reuse:
            return []
        full = (len(seq.tokens) - 1) // self.pool.block_size
        self._extend_keys(seq, full)
        return self.pool.lookup(seq.keys[:full])

    def _extend_keys(self, seq: Sequence, full_blocks: int) -> None:
        size = self.pool.block_size
        while len(seq.keys) < full_blocks:
            index = len(seq.keys)
            parent = seq.keys[-1] if seq.keys else self._queues[seq.variant].root
            seq.keys.append(chain_key(parent, seq.tokens[index * size : (index + 1) * size]))

    def _preempt(self, seq: Sequence) -> None:
        queues = self._queues[seq.variant]
        queues.running.remove(seq)
        queues.preemptions += 1
        self._free(seq)
        insort(queues.waiting, seq, key=_arrival)

    def _free(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks + seq.tail)
        seq.blocks, seq.tail = [], []
        seq.computed = 0
