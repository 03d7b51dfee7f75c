"""Which tokens run next: queues, chunked prefill, decode batches, preemption. Torch-free, no clock.

One `Scheduler` decides for all variants that share one KV pool, so that blocks go to the oldest
request whatever its level. It plans; `core` runs the plan and reports back. A sequence's life:

    add → waiting → plan (admit: blocks for all its tokens, prefix reused) → running
        → plan/advance/foresee/append … → finish (or cancel, or preempt → waiting)

A sampled token may still be under way when the next step is planned: `foresee` gives it its place,
`append` its value. Until then it counts as a token, but its block is shared with nobody, a sequence
that it completes is not planned, and one preempted before it came is not admitted again.

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

UNKNOWN = -1  # stands for a token that is still being sampled


@dataclass(frozen=True, slots=True)
class Limits:
    """Per variant. `prefill_chunk` is in tokens per step."""

    max_num_seqs: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 256


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and where they are.

    `tokens` is prompt and output, the last `pending` of them unknown (-1); `computed` counts those
    whose KV is in `blocks`, `stored` the blocks that others may reuse; `tail` are blocks it works
    in besides; `no_reuse` makes the whole prompt be computed (its logits are wanted); KV of a
    `mixed` one is of several variants, offered to nobody.
    """

    variant: str
    prompt_length: int
    max_tokens: int
    tokens: list[int]
    no_reuse: bool = False
    mixed: bool = False
    arrival: int = -1
    pending: int = 0
    computed: int = 0
    stored: int = 0
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
        """Output tokens, pending ones included."""
        return len(self.tokens) - self.prompt_length

    @property
    def known(self) -> int:
        """Output tokens whose value is there."""
        return len(self.tokens) - self.prompt_length - self.pending


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
    drafted: int = 0
    accepted: int = 0


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
        size = self.pool.block_size
        for seq in tuple(queues.running):  # (1)
            short = len(seq.tokens) > len(seq.blocks) * size
            if short and seq.blocks and seq.left == 1 and seq.generated < seq.max_tokens:
                self._grow(seq)
        if queues.waiting:
            self._admit(queues)  # (2)
        budget = self._limits.prefill_chunk
        decode, prefill = [], []
        for seq in queues.running:
            left = seq.left
            if left == 1:
                if seq.generated < seq.max_tokens:
                    decode.append(seq)
            elif left > 1 and budget > 0:  # (3)
                length = min(left, budget)
                prefill.append(Chunk(seq, seq.computed, length))
                budget -= length
        return Plan(tuple(decode), tuple(prefill))

    def reserve(self, seq: Sequence, extra: int) -> int:
        """Give a running `seq` free blocks for up to `extra` tokens more; how many fit."""
        size = self.pool.block_size
        missing = self._blocks_for(len(seq.tokens) + extra) - len(seq.blocks)
        if missing > 0 and not any(queues.waiting for queues in self._queues.values()):
            seq.blocks += self.pool.allocate(min(missing, self.pool.available)) or []
        return min(extra, len(seq.blocks) * size - len(seq.tokens))

    def advance(self, seq: Sequence, computed: int) -> None:
        """Tell that `computed` more tokens of `seq` are, or will be before the next step, in the
        pool. Full blocks of known tokens are open to others from now on."""
        seq.computed += computed
        full = min(seq.computed, len(seq.tokens) - seq.pending) // self.pool.block_size
        if full > seq.stored and not seq.mixed:
            self._extend_keys(seq, full)
            for index in range(seq.stored, full):
                self.pool.store(seq.blocks[index], seq.keys[index])
            seq.stored = full

    def move(self, seq: Sequence, variant: str) -> bool:
        """Let another variant go on with a running sequence, on its KV; False: it has no place."""
        old, new = self._queues[seq.variant], self._queues[variant]
        if seq not in old.running or len(new.running) >= self._limits.max_num_seqs:
            return False
        old.running.remove(seq)
        insort(new.running, seq, key=_arrival)
        seq.variant, seq.keys, seq.mixed = variant, [], True
        return True

    def count_drafts(self, variant: str, drafted: int, accepted: int) -> None:
        """Add to what speculation proposed for a variant's sequences, and what was kept of it."""
        queues = self._queues[variant]
        queues.drafted += drafted
        queues.accepted += accepted

    def foresee(self, seq: Sequence) -> None:
        """A token of `seq` is being sampled; `append` will tell which."""
        seq.tokens.append(UNKNOWN)
        seq.pending += 1

    def append(self, seq: Sequence, token: int) -> None:
        """Add a sampled token, or tell the first one foreseen; it is computed in a later step."""
        if seq.pending:
            seq.tokens[-seq.pending] = token
            seq.pending -= 1
        else:
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
            drafted_tokens=queues.drafted,
            accepted_tokens=queues.accepted,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, sequences and pool agree."""
        self.pool.check_integrity(seq.blocks + seq.tail for seq in self._running())
        size = self.pool.block_size
        for queues in self._queues.values():
            assert len(queues.running) <= self._limits.max_num_seqs
            assert queues.running == sorted(queues.running, key=_arrival)
            assert queues.waiting == sorted(queues.waiting, key=_arrival)
            assert not set(map(id, queues.running)) & set(map(id, queues.waiting))
            for seq in queues.waiting:
                assert not seq.blocks
                assert not seq.tail
                assert seq.computed == 0
            for seq in (*queues.running, *queues.waiting):
                unknown = [i for i, token in enumerate(seq.tokens) if token == UNKNOWN]
                assert unknown == list(range(len(seq.tokens) - seq.pending, len(seq.tokens)))
                assert seq.stored * size <= min(seq.computed, len(seq.tokens) - seq.pending)
                parent = queues.root
                for index, key in enumerate(seq.keys):
                    parent = chain_key(parent, seq.tokens[index * size : (index + 1) * size])
                    assert key == parent
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
            if seq.pending or self._older_waits_for_blocks(seq):
                return
            reused = self._reusable(seq)
            missing = self._blocks_for(len(seq.tokens)) - len(reused) + self._tail
            if missing + self.pool.idle(reused) > self.pool.available:
                return
            self.pool.hold(reused)
            blocks = self.pool.allocate(missing)
            assert blocks is not None, "availability was checked"
            seq.tail, seq.blocks = blocks[: self._tail], reused + blocks[self._tail :]
            seq.stored = len(reused)
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
        seq.blocks, seq.tail, seq.mixed = [], [], False
        seq.computed = seq.stored = 0
