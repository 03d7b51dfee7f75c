"""The scheduler and the block books, driven by hand: no torch, no model, every step checked."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.engine.base import BadPrompt, EngineOverloaded
from gateway.engine.kv_cache import BlockPool, chain_key, root_key
from gateway.engine.scheduler import Limits, Plan, Scheduler, Sequence


def make(
    blocks: int = 20, size: int = 4, variants: tuple[str, ...] = ("a",), **limits: int
) -> Scheduler:
    scheduler = Scheduler(
        BlockPool(blocks + 1, size), Limits(**({"max_num_seqs": 4, "prefill_chunk": 8} | limits))
    )
    for variant in variants:
        scheduler.open(variant, identity=variant)
    return scheduler


def seq(prompt: int | list[int], max_tokens: int = 4, variant: str = "a") -> Sequence:
    tokens = [9] * prompt if isinstance(prompt, int) else prompt
    return Sequence(variant, len(tokens), max_tokens, list(tokens))


def execute(scheduler: Scheduler, plan: Plan, token: int = 5) -> None:
    """What the engine does with a plan, with a made-up model."""
    sampled = list(plan.decode)
    for one in plan.decode:
        scheduler.advance(one, 1)
    for chunk in plan.prefill:
        if chunk.samples:
            sampled.append(chunk.seq)
        scheduler.advance(chunk.seq, chunk.length)
    for one in sampled:
        scheduler.append(one, token)
        if one.generated >= one.max_tokens:
            scheduler.finish(one)


class Late:
    """Runs plans as an engine that learns a step's tokens after the next one was planned."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.under_way: list[Sequence] = []

    def execute(self, plan: Plan, token: int = 5) -> None:
        before, self.under_way = self.under_way, list(plan.decode)
        for one in plan.decode:
            self.scheduler.advance(one, 1)
        for chunk in plan.prefill:
            if chunk.samples:
                self.under_way.append(chunk.seq)
            self.scheduler.advance(chunk.seq, chunk.length)
        for one in self.under_way:
            assert one.generated < one.max_tokens
            self.scheduler.foresee(one)
        self.scheduler.check_integrity()
        for one in before:
            self.scheduler.append(one, token)
            if one.known >= one.max_tokens:
                self.scheduler.finish(one)


def test_a_long_prompt_never_stops_decoding() -> None:
    scheduler = make(blocks=100)
    first, long = seq(4, 30), seq(80, 4)
    scheduler.add(first)
    execute(scheduler, scheduler.plan("a"))
    scheduler.add(long)
    while long.generated == 0:
        plan = scheduler.plan("a")
        assert first in plan.decode
        assert sum(chunk.length for chunk in plan.prefill) <= 8
        execute(scheduler, plan)
        scheduler.check_integrity()


def test_short_prompts_share_a_step() -> None:
    scheduler = make(blocks=100)
    for length in (3, 2, 2, 5):
        scheduler.add(seq(length))
    plan = scheduler.plan("a")
    assert [chunk.length for chunk in plan.prefill] == [3, 2, 2, 1]
    assert [chunk.samples for chunk in plan.prefill] == [True, True, True, False]


def test_chunks_cover_the_prompt_once_and_in_order() -> None:
    scheduler = make(blocks=100)
    long = seq(list(range(45)), 1)
    scheduler.add(long)
    spans = []
    while long.generated == 0:
        plan = scheduler.plan("a")
        spans += [(c.start, c.start + c.length) for c in plan.prefill]
        spans += [(one.computed, one.computed + 1) for one in plan.decode]
        execute(scheduler, plan)
    assert spans[0][0] == 0
    assert spans[-1][1] == 45
    assert all(left[1] == right[0] for left, right in pairwise(spans))


def test_the_youngest_is_preempted_and_resumes() -> None:
    scheduler = make(blocks=6)
    old, young = seq(8, 12), seq([7] * 8, 12)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.has_work("a"):
        execute(scheduler, scheduler.plan("a"))
        scheduler.check_integrity()
        if young.generated < young.max_tokens and not young.blocks:
            assert old.blocks or old.generated == old.max_tokens
    assert (old.generated, young.generated) == (12, 12)
    assert scheduler.stats("a").preemptions > 0
    assert scheduler.pool.used == 0


def test_a_prefix_is_reused_inside_a_variant_only() -> None:
    scheduler = make(variants=("a", "b"))
    prompt = list(range(10))
    for variant in ("a", "a", "b"):
        one = seq(prompt, 1, variant)
        scheduler.add(one)
        while scheduler.has_work(variant):
            execute(scheduler, scheduler.plan(variant))
    assert scheduler.stats("a").prefix_hit_tokens == 8
    assert scheduler.stats("b").prefix_hit_tokens == 0


def test_running_sequences_share_prefix_blocks() -> None:
    scheduler = make(blocks=20)
    prompt = list(range(17))
    first = seq(prompt, 5)
    scheduler.add(first)
    for _ in range(3):
        execute(scheduler, scheduler.plan("a"))
    second = seq(prompt, 5)
    scheduler.add(second)
    execute(scheduler, scheduler.plan("a"))
    assert second.blocks[:4] == first.blocks[:4]
    assert second.blocks[4] != first.blocks[4]
    scheduler.check_integrity()


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    scheduler = make()
    for _ in range(2):
        one = seq(list(range(8)), 1)
        scheduler.add(one)
        plan = scheduler.plan("a")
        execute(scheduler, plan)
    assert one.cached == 4
    assert plan.prefill[0].start == 4


def test_no_reuse_computes_everything() -> None:
    scheduler = make()
    for _ in range(2):
        one = seq(list(range(8)), 1)
        one.no_reuse = True
        scheduler.add(one)
        plan = scheduler.plan("a")
        execute(scheduler, plan)
    assert plan.prefill[0].start == 0


def test_the_queue_is_bounded() -> None:
    scheduler = make(max_num_seqs=1, max_waiting=1)
    scheduler.add(seq(4))
    scheduler.add(seq(4))
    with pytest.raises(EngineOverloaded):
        scheduler.add(seq(4))


def test_a_prompt_that_can_never_fit_is_refused_and_output_is_cut() -> None:
    scheduler = make(blocks=4, max_num_seqs=1, max_waiting=0)
    with pytest.raises(BadPrompt):
        scheduler.add(seq(16))
    fits = seq(10, 100)
    scheduler.add(fits)
    assert fits.max_tokens == 6
    with pytest.raises(BadPrompt):  # also while the queue is full: waiting would not help
        scheduler.add(seq(16))


def test_an_older_sequence_of_another_variant_gets_its_blocks() -> None:
    scheduler = make(blocks=10, variants=("a", "b"), max_num_seqs=8)
    holder = seq(20, 8)
    scheduler.add(holder)
    execute(scheduler, scheduler.plan("a"))
    waits = seq([3] * 30, 4, "b")
    scheduler.add(waits)
    assert not scheduler.plan("b")
    late = seq([4] * 8, 4)
    scheduler.add(late)
    while not waits.blocks:
        for variant in ("a", "b"):
            execute(scheduler, scheduler.plan(variant))
            scheduler.check_integrity()
        assert waits.blocks or not late.blocks
    assert waits.blocks


def test_a_smaller_pool_takes_over_and_loses_only_what_cannot_fit() -> None:
    scheduler = make(blocks=20)
    small, large = seq(6, 4), seq([2] * 40, 4)
    for one in (small, large):
        scheduler.add(one)
    for _ in range(3):
        execute(scheduler, scheduler.plan("a"))
    lost = scheduler.replace_pool(BlockPool(9, 4))
    assert lost == [large]
    scheduler.check_integrity()
    while scheduler.has_work("a"):
        execute(scheduler, scheduler.plan("a"))
        scheduler.check_integrity()
    assert small.generated == 4


@given(st.lists(st.integers(0, 300), max_size=20), st.lists(st.integers(0, 300), max_size=20))
def test_keys_differ_where_tokens_or_prefixes_differ(left: list[int], right: list[int]) -> None:
    root = root_key("v")
    assert (chain_key(root, left) == chain_key(root, right)) == (left == right)
    assert chain_key(root_key("v"), left) != chain_key(root_key("w"), left)


class Life(RuleBasedStateMachine):
    """Arbitrary arrivals, steps and cancellations over two variants; every sequence must end."""

    @initialize(
        blocks=st.integers(4, 24),
        size=st.sampled_from([1, 3, 4]),
        seqs=st.integers(1, 4),
        chunk=st.integers(1, 9),
        late=st.booleans(),
    )
    def start(self, blocks: int, size: int, seqs: int, chunk: int, late: bool) -> None:
        self.scheduler = make(
            blocks, size, ("a", "b"), max_num_seqs=seqs, prefill_chunk=chunk, max_waiting=6
        )
        self.late = Late(self.scheduler) if late else None
        self.places = seqs + 6
        self.alive: list[Sequence] = []

    @rule(
        variant=st.sampled_from("ab"),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=25),
        new=st.integers(1, 9),
    )
    def add(self, variant: str, tokens: list[int], new: int) -> None:
        one = seq(tokens, new, variant)
        try:
            self.scheduler.add(one)
        except BadPrompt:
            assert len(tokens) >= self.scheduler.capacity
        except EngineOverloaded:
            stats = self.scheduler.stats(variant)
            assert stats.running + stats.waiting == self.places
        else:
            self.alive.append(one)

    @rule(variant=st.sampled_from("ab"), token=st.integers(0, 1))
    def step(self, variant: str, token: int) -> None:
        plan = self.scheduler.plan(variant)
        self.scheduler.check_integrity()
        for chunk in plan.prefill:
            assert chunk.start == chunk.seq.computed
            assert 0 < chunk.length <= chunk.seq.left
        for one in plan.decode:
            assert len(one.blocks) * self.scheduler.pool.block_size >= len(one.tokens)
        self.execute(plan, token)
        self.alive = [one for one in self.alive if one.known < one.max_tokens]

    def execute(self, plan: Plan, token: int = 5) -> None:
        if self.late is None:
            execute(self.scheduler, plan, token)
        else:
            self.late.execute(plan, token)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        self.scheduler.finish(one)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        budget = 2000
        while any(self.scheduler.has_work(v) for v in "ab"):
            for variant in "ab":
                self.execute(self.scheduler.plan(variant))
            self.scheduler.check_integrity()
            budget -= 1
            assert budget, "the scheduler makes no progress"
        assert self.scheduler.pool.used == 0


def test_a_preempted_sequence_waits_for_the_token_under_way() -> None:
    scheduler = make()
    one = seq(6, 5)
    scheduler.add(one)
    late = Late(scheduler)
    late.execute(scheduler.plan("a"))
    scheduler.preempt_all()
    assert not scheduler.plan("a")
    scheduler.append(one, 5)
    assert [chunk.length for chunk in scheduler.plan("a").prefill] == [7]
    scheduler.check_integrity()


def test_reserved_blocks_come_from_nobody() -> None:
    scheduler = make(blocks=8)
    first, second = seq(8, 20), seq([7] * 8, 20)
    scheduler.add(first)
    scheduler.add(second)
    execute(scheduler, scheduler.plan("a"))
    execute(scheduler, scheduler.plan("a"))
    assert second.generated == 1
    assert scheduler.reserve(first, 2) == 2
    assert scheduler.reserve(first, 100) == 4 * len(first.blocks) - len(first.tokens)
    assert scheduler.pool.available == 0
    assert scheduler.reserve(second, 1) == 4 * len(second.blocks) - len(second.tokens)
    scheduler.check_integrity()
    scheduler.add(seq(4))
    assert scheduler.reserve(second, 9) < 9
    while scheduler.has_work("a"):
        execute(scheduler, scheduler.plan("a"))
        scheduler.check_integrity()
    assert (first.generated, second.generated) == (20, 20)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
