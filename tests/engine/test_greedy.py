"""Greedy output equals transformers.generate, token for token, however the engine schedules it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gateway.engine.core import Core, Job
from gateway.engine.runner import build_model, forward_logits
from gateway.engine.tokenizer import Tokenizer

from .conftest import (
    FAMILIES,
    VOCAB,
    reference_model,
    reference_tokens,
    request,
    run,
    small_core,
    tokens_of,
    weights_of,
)

Maker = Callable[[str], Path]


def prompts(count: int, longest: int = 50, seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def loaded(core: Core, folder: Path, tokenizer: Tokenizer, name: str = "v") -> Core:
    core.attach(name, build_model(weights_of(folder)), tokenizer)
    return core


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_batched_preempted_and_reused(
    family: str, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder = checkpoint(family)
    reference = reference_model(folder)
    ragged = prompts(6)
    expected = [reference_tokens(reference, prompt, 12) for prompt in ragged]

    core = loaded(small_core(), folder, bytes_tokenizer)
    alone = run(core, [Job("v", request(ragged[0], 12), bytes_tokenizer)])
    assert tokens_of(alone[0]) == expected[0]

    jobs = [Job("v", request(prompt, 12), bytes_tokenizer) for prompt in ragged]
    batched = run(core, jobs)
    assert [tokens_of(events) for events in batched] == expected

    again = run(core, [Job("v", request(p, 12), bytes_tokenizer) for p in ragged])
    assert [tokens_of(events) for events in again] == expected
    assert core.stats("v").prefix_hit_tokens > 0
    assert sum(events[0].cached_tokens for events in again) > 0

    block = core._variants["v"].model.layout.block_bytes(4)
    tiny = loaded(small_core(kv_bytes=block * 24), folder, bytes_tokenizer)
    squeezed = run(tiny, [Job("v", request(p, 12), bytes_tokenizer) for p in ragged])
    assert [tokens_of(events) for events in squeezed] == expected
    assert tiny.stats("v").preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_match_the_full_forward(
    family: str, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder = checkpoint(family)
    prompt = prompts(1, seed=3)[0] + list(range(10, 40))
    core = loaded(small_core(), folder, bytes_tokenizer)
    (events,) = run(
        core,
        [Job("v", request(prompt, 10, logprobs=3, prompt_logprobs=True), bytes_tokenizer)],
    )
    sequence = prompt + tokens_of(events)
    with torch.no_grad():
        raw = reference_model(folder)(torch.tensor([sequence])).logits[0]
    logprobs = torch.log_softmax(raw.double(), -1)

    scored = events[0].prompt_logprobs
    assert scored is not None
    assert [s.token for s in scored] == prompt
    assert scored[0].logprob is None
    entries = [*scored[1:], *(e.logprob for e in events if e.logprob is not None)]
    assert len(entries) == len(sequence) - 1
    for at, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(logprobs[at, entry.token]), abs=1e-4)
        best = torch.topk(logprobs[at], 3)
        assert [t for t, _, _ in entry.top] == best.indices.tolist()
        assert [p for _, _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_prompt_logprobs_survive_preemption(checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    model = build_model(weights_of(checkpoint("llama")))
    ragged = prompts(6, longest=60, seed=5)

    def scores(kv_blocks: int, chunk: int) -> tuple[list[list[float | None]], int]:
        core = small_core(kv_bytes=model.layout.block_bytes(4) * kv_blocks, prefill_chunk=chunk)
        core.attach("v", model, bytes_tokenizer)
        jobs = [Job("v", request(p, 12, prompt_logprobs=True), bytes_tokenizer) for p in ragged]
        scored = [events[0].prompt_logprobs or () for events in run(core, jobs)]
        return [[s.logprob for s in one] for one in scored], core.stats("v").preemptions

    roomy, _ = scores(400, 64)
    squeezed, preemptions = scores(26, 5)
    assert preemptions > 0
    for prompt, left, right in zip(ragged, roomy, squeezed, strict=True):
        assert len(left) == len(right) == len(prompt)
        assert left[1:] == pytest.approx(right[1:], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_window_logits_match(family: str, checkpoint: Maker) -> None:
    folder = checkpoint(family)
    windows = torch.randint(3, VOCAB, (3, 70), generator=torch.Generator().manual_seed(1))
    ours = forward_logits(build_model(weights_of(folder)), windows)
    with torch.no_grad():
        theirs = reference_model(folder)(windows).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
