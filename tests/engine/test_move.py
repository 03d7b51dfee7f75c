"""A running sequence moves to another level at a token boundary, on the KV that is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.base import GenerationRequest, Movable, SamplingParams, TokenEvent
from gateway.engine.core import Core, Job
from gateway.engine.fake import FakeEngine, FakeSpeed
from gateway.engine.local import LocalOptions, LocalRuntime
from gateway.engine.runner import build_model
from gateway.engine.scheduler import Sequence
from gateway.engine.tokenizer import Tokenizer

from .conftest import request, run, small_core, tokens_of, weights_of
from .test_overlap import LETTERS, Device, Following, Leading, attach, make_core

Maker = Callable[[str], Path]


def expected(prompt: list[int], salts: str) -> list[int]:
    """Greedy answer of the made-up model; letter i says whose weights give token i."""
    tokens = list(prompt)
    for salt in salts:
        device = Device(torch.tensor(tokens).numpy())
        seq = Sequence("", len(tokens), 0, tokens, blocks=list(range(len(tokens))))
        tokens.append(int(Following(salt, device)._logits(seq, len(tokens)).argmax()))
    return tokens[len(prompt) :]


@given(
    prompts=st.lists(
        st.lists(st.sampled_from(LETTERS[:2]), min_size=1, max_size=14), min_size=1, max_size=6
    ),
    moves=st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 5), st.sampled_from("ab")), max_size=8
    ),
    blocks=st.integers(9, 40),
    kind=st.sampled_from([Following, Leading]),
)
@settings(max_examples=120, deadline=None)
def test_each_token_is_of_the_level_that_was_told(
    bytes_tokenizer: Tokenizer,
    prompts: list[list[int]],
    moves: list[tuple[int, int, str]],
    blocks: int,
    kind: type[Following],
) -> None:
    """Whatever is preempted, reused or in flight meanwhile."""
    core, _ = make_core(kind, blocks)
    attach(core, bytes_tokenizer)
    jobs = [Job("a", request(prompt, 12), bytes_tokenizer) for prompt in prompts]
    told: list[list[TokenEvent]] = [[] for _ in jobs]
    boundaries: list[list[tuple[int, str]]] = [[(0, "a")] for _ in jobs]

    def keep(events: list[Any]) -> None:
        for job, event in events:
            assert isinstance(event, TokenEvent)
            told[jobs.index(job)].append(event)

    for job in jobs:
        core.submit(job)
    step = 0
    while core.busy:
        step += 1
        for when, who, where in moves:
            if when == step and who < len(jobs):
                boundary, events = core.move(jobs[who], where)
                keep(events)
                core.check_integrity()
                if boundary is not None:
                    boundaries[who].append((boundary, where))
        keep(core.step())
        core.check_integrity()
    for prompt, got, changes in zip(prompts, told, boundaries, strict=True):
        salts = list("a" * 12)
        for boundary, where in changes:
            salts[boundary:] = where * (12 - boundary)
        assert tokens_of(got) == expected(prompt, "".join(salts))


def attached(checkpoint: Maker, tokenizer: Tokenizer, **options: Any) -> tuple[Core, list[Any]]:
    """A core with two different models of one layout, and transformers' own."""
    core, modules = small_core(**options), []
    folder = checkpoint("llama")
    for name, noise in (("a", 0.0), ("b", 0.05)):
        weights = weights_of(folder)
        generator = torch.Generator().manual_seed(3)
        for tensor in weights.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=noise)
        modules.append(_module(folder, weights.tensors))
        core.attach(name, build_model(weights), tokenizer)
    return core, modules


def _module(folder: Path, tensors: Any) -> Any:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module.load_state_dict({n: t.clone() for n, t in tensors.items()}, strict=False)
    module.tie_weights()
    return module


@torch.inference_mode()
def on_anothers_cache(modules: list[Any], prompt: list[int], boundary: int, new: int) -> list[int]:
    """Greedy tokens by transformers: the first model's keys and values, then the second's model on
    top of them."""
    tokens, cache = list(prompt), None
    for index in range(new):
        module = modules[index >= boundary]
        fresh = torch.tensor([tokens if cache is None else tokens[-1:]])
        out = module(fresh, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("boundary", [1, 4, 9])
def test_the_next_level_goes_on_with_the_keys_and_values_that_are_there(
    checkpoint: Maker, bytes_tokenizer: Tokenizer, boundary: int
) -> None:
    core, modules = attached(checkpoint, bytes_tokenizer)
    prompt = [3 + (7 * i) % 200 for i in range(21)]
    job = Job("a", request(prompt, 14), bytes_tokenizer)
    core.submit(job)
    events: list[TokenEvent] = []
    while core.busy:
        if len(events) == boundary and job.seq.variant == "a":
            assert core.move(job, "b")[0] == boundary
        events += [event for _, event in core.step() if isinstance(event, TokenEvent)]
        core.check_integrity()
    assert tokens_of(events) == on_anothers_cache(modules, prompt, boundary, 14)
    assert tokens_of(events) != on_anothers_cache(modules, prompt, 99, 14)


def test_what_two_levels_computed_is_offered_to_nobody(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    core, modules = attached(checkpoint, bytes_tokenizer)
    prompt = [3 + (5 * i) % 200 for i in range(18)]
    job = Job("a", request(prompt, 20), bytes_tokenizer)
    core.submit(job)
    answer: list[int] = []
    while core.busy:
        if len(answer) == 3:
            core.move(job, "b")
        answer += [e.token for _, e in core.step() if isinstance(e, TokenEvent) and e.token]
    for name, module in zip("ab", modules, strict=True):
        longer = prompt + answer
        [events] = run(core, [Job(name, request(longer, 6), bytes_tokenizer)])
        assert tokens_of(events) == on_anothers_cache([module, module], longer, 0, 6)


def test_a_sequence_that_waits_or_is_over_or_whose_level_is_full_stays(
    bytes_tokenizer: Tokenizer,
) -> None:
    core, _ = make_core(Following, 40, max_num_seqs=1)
    attach(core, bytes_tokenizer)
    first, second, other = (Job(v, request([68], 3), bytes_tokenizer) for v in "aab")
    for job in (first, second, other):
        core.submit(job)
    core.step()
    core.step()
    assert core.move(second, "b")[0] is None  # waits
    assert core.move(first, "b")[0] is None  # no place beside `other`
    assert core.move(first, "a")[0] is None
    assert core.move(first, "nowhere")[0] is None
    while core.busy:
        core.step()
    assert core.move(first, "b")[0] is None  # over


async def test_the_runtime_moves_by_request_and_unloading_the_first_level_loses_nothing(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    runtime = LocalRuntime(LocalOptions(block_size=4, kv_bytes=8 << 20))
    weights = weights_of(checkpoint("llama"))
    one = await runtime.load("a", weights, bytes_tokenizer)
    two = await runtime.load("b", weights, bytes_tokenizer)
    asked = GenerationRequest(
        "it", tuple(range(3, 20)), SamplingParams(120, temperature=0.0, ignore_eos=True)
    )
    assert isinstance(one, Movable)
    assert await one.move("it", two) is None  # nothing of that name
    events: list[TokenEvent] = []
    async for event in one.generate(asked):
        events.append(event)
        if len(events) == 5:
            boundary = await one.move("it", two)
            assert boundary is not None
            assert boundary >= 5
            await one.close()
    assert len(tokens_of(events)) == 120
    again = [event async for event in two.generate(asked)]
    assert tokens_of(again) == tokens_of(events)
    await two.close()
    await runtime.close()


async def test_the_stand_in_moves_too() -> None:
    slow, fast = FakeEngine(FakeSpeed(tpot_ms=400.0)), FakeEngine(FakeSpeed(tpot_ms=0.1))
    asked = GenerationRequest("it", (1, 2), SamplingParams(200, temperature=0.0))
    count = 0
    async with asyncio.timeout(20):
        async for _ in slow.generate(asked):
            count += 1
            if count == 1:
                assert await slow.move("it", fast) == 1
                assert (slow.stats().running, fast.stats().running) == (0, 1)
    assert count == 200
    assert fast.stats().running == 0
