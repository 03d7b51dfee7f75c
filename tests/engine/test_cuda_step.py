"""The CUDA step: whole models against transformers.

On a CUDA device where there is one (marker gpu); on the CPU through Triton's interpreter, where
Triton is installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from gateway.engine import runners
from gateway.engine.attention import PlainKV, Pool
from gateway.engine.core import Job
from gateway.engine.cuda.graphs import Graphs
from gateway.engine.cuda.prompts import PromptSteps
from gateway.engine.cuda.step import CudaRunner
from gateway.engine.cuda.weights import Joined
from gateway.engine.kernels.store import pack
from gateway.engine.kv_quant import make_pool
from gateway.engine.runner import Model, Runner, VariantWeights, build_model
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.tokenizer import Tokenizer
from tests.engine.conftest import (
    VOCAB,
    reference_model,
    reference_tokens,
    request,
    run,
    small_core,
    tokens_of,
    weights_of,
)
from tests.engine.cuda_parts import cuda, device, error
from tests.engine.kernels.forms import grouped

__all__ = ["device"]
Checkpoints = Callable[[str], Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@pytest.mark.parametrize("bias", [True, False])
def test_joined_linears_share_their_weights(bias: bool) -> None:
    linears = [torch.nn.Linear(24, n, bias=bias) for n in (8, 3, 5)]
    x = torch.randn(4, 24)
    with torch.inference_mode():
        wanted = [linear(x) for linear in linears]
        joined = Joined(linears)
        for found in (joined(x), Joined(linears)(x), [linear(x) for linear in linears]):
            for left, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(left, right)
    storages = {linear.weight.untyped_storage().data_ptr() for linear in linears}
    assert len(storages) == 1
    assert linears[0].weight.untyped_storage().nbytes() == 16 * 24 * 4
    other = [torch.nn.Linear(24, 4), torch.nn.Identity()]
    assert [tuple(part.shape) for part in Joined(other)(x)] == [(4, 4), (4, 24)]


def _pool(model: Model, device: str, blocks: int = 64) -> Pool:
    return make_pool(model.layout, blocks, 4, device)


def _kv(pool: Pool) -> list[PlainKV]:
    return [kv for kv in pool.layers if isinstance(kv, PlainKV)]


def _start(lengths: list[int]) -> list[Tokens]:
    """Sequences with blocks for some tokens more."""
    seqs, first = [], 1
    for index, length in enumerate(lengths):
        count = -(-(length + 8) // 4)
        tokens = [5 + (7 * i + 11 * index) % 200 for i in range(length)]
        seqs.append(Tokens("v", length, 8, tokens, blocks=list(range(first, first + count))))
        first += count
    return seqs


def _some_steps(runner: runners.StepRunner, pool: Pool) -> list[Tensor]:
    """Logits of packed chunks, of a later chunk, and of batches whose rows change."""
    runner.bind(pool)
    a, b, c = _start([27, 3, 9])
    found = runner.prefill([Chunk(a, 0, 21), Chunk(b, 0, 2), Chunk(c, 0, 8)], [True, False, False])
    found += runner.prefill([Chunk(a, 21, 5)], [False])
    for batch in ([a, b, c], [c, a], [a, b, c]):
        found.append(runner.decode(batch))
        for seq in batch:
            seq.tokens.append(6 + len(seq.tokens))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_transformers_does(
    checkpoint: Checkpoints, family: str, device: str
) -> None:
    model = build_model(weights_of(checkpoint(family)), device=device)
    assert model.decoder is not None
    assert runners.settle(model).decoder is model.decoder
    runner = runners.make_runner(model, _pool(model, device), max_batch=4)
    assert isinstance(runner, CudaRunner)
    eager = Runner(model, _pool(model, device), max_batch=4)
    wanted, found = (_some_steps(one, _pool(model, device)) for one in (eager, runner))
    for left, right in zip(found, wanted, strict=True):
        assert left.dtype is torch.float32
        assert error(left, right) < 1e-3


def test_rows_of_one_sequence_see_each_other(checkpoint: Checkpoints, device: str) -> None:
    """Tokens of a draft, checked in one step as rows that share a table."""
    model = build_model(weights_of(checkpoint("llama")), device=device)
    runner = runners.make_runner(model, _pool(model, device), max_batch=4)
    (seq,) = _start([9])
    tokens = [*seq.tokens, 50, 60, 70]
    one_by_one, cut = [], [replace(seq, tokens=tokens[:n]) for n in range(10, 13)]
    runner.prefill([Chunk(seq, 0, 9)], [False])
    at_once = runner.decode(cut)
    for part in cut:
        one_by_one.append(runner.decode([part]))
    torch.testing.assert_close(at_once, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)


def test_tokens_that_only_the_device_knows(checkpoint: Checkpoints, device: str) -> None:
    model = build_model(weights_of(checkpoint("llama")), device=device)
    logits = []
    for known in (True, False):
        runner = runners.make_runner(model, _pool(model, device), max_batch=4)
        assert isinstance(runner, CudaRunner)
        batch = _start([6, 11])
        runner.prefill([Chunk(seq, 0, len(seq.tokens)) for seq in batch], [False, False])
        for token in range(30, 34):
            ids = torch.tensor([token, token + 50], device=device)
            for seq, own in zip(batch, ids.tolist(), strict=True):
                seq.tokens.append(own if known else -1)
            logits.append(runner.decode(batch) if known else runner.decode_from(batch, ids))
    for left, right in zip(logits[:4], logits[4:], strict=True):
        torch.testing.assert_close(left, right)


def test_short_prompts_filled_up_to_a_size(checkpoint: Checkpoints, device: str) -> None:
    """The same logits as without, the first time, captured, and replayed with other prompts."""
    model = build_model(weights_of(checkpoint("mistral")), device=device)
    pool = _pool(model, device)
    runner = runners.make_runner(model, pool, max_batch=4)
    assert isinstance(runner, CudaRunner)
    steps = [
        PromptSteps(runner.prompt_logits, 4, 64, torch.device(device), filled=filled)
        for filled in (False, True)
    ]
    for lengths in ([9, 3], [5, 2], [4, 8], [30]):
        seqs = _start(lengths)
        first = [Chunk(seq, 0, len(seq.tokens) - 1) for seq in seqs]
        last = [Chunk(seq, len(seq.tokens) - 1, 1) for seq in seqs]
        for chunks in (first, last):
            with torch.inference_mode():
                wanted, found = (step.run(chunks, [False] * len(chunks)) for step in steps)
            for left, right in zip(found, wanted, strict=True):
                assert left.shape == (1, VOCAB)
                assert error(left, right) < 1e-5
            # What fills up is written to the scratch block, which other runners read and mask.
            assert all(bool(kv.keys[0].isfinite().all()) for kv in _kv(pool))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_answers_through_the_engine(
    checkpoint: Checkpoints, family: str, device: str, bytes_tokenizer: Tokenizer
) -> None:
    """Chunks, growing tables, sequences that come and go: greedy tokens are transformers'."""
    prompts = [[5, 6, 7], list(range(20, 61)), [9]]
    lengths = [9, 4, 6]
    reference = reference_model(checkpoint(family))
    core = small_core(device=device, max_num_seqs=4)
    core.attach("v", build_model(weights_of(checkpoint(family)), device=device), bytes_tokenizer)
    jobs = [Job("v", request(p, n), bytes_tokenizer) for p, n in zip(prompts, lengths, strict=True)]
    found = [tokens_of(events) for events in run(core, jobs)]
    wanted = [reference_tokens(reference, p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert found == wanted


def test_quantized_keys_and_other_builds_keep_their_runner(
    checkpoint: Checkpoints, device: str
) -> None:
    model = build_model(weights_of(checkpoint("gpt2")), device=device)
    assert isinstance(runners.make_runner(model, _pool(model, device), max_batch=2), Runner)


@pytest.mark.gpu
@cuda
def test_graphs_replay_what_they_captured() -> None:
    source = torch.zeros(8, device="cuda")
    graphs = Graphs(lambda rows: source[:rows] * 2, enabled=True)
    for value in range(4):
        source.fill_(value)
        assert graphs.run(4).tolist() == [2.0 * value] * 4
    assert graphs.sizes == [4]
    graphs.run(8)
    graphs.run(8)
    assert graphs.sizes == [4, 8]
    graphs.drop()
    assert graphs.sizes == []


@pytest.mark.gpu
@cuda
def test_a_step_that_waits_for_the_device_is_not_captured() -> None:
    source = torch.ones(8, device="cuda")
    graphs = Graphs(lambda rows: source[:rows] * float(source.sum()), enabled=True)
    for _ in range(3):
        assert graphs.run(2).tolist() == [8.0, 8.0]
    assert graphs.sizes == []


def _coded(bits: int) -> VariantWeights:
    """A small bf16 Llama whose linears, embedding and head are packed codes."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    dtype = torch.bfloat16
    dense = {name: p.detach() for name, p in LlamaForCausalLM(config).to(dtype).named_parameters()}
    tensors, linears = {}, {}
    for name, weight in dense.items():
        if name.endswith("_proj.weight"):
            form = grouped(tuple(weight.shape), bits=bits, group=128 if bits < 8 else 1 << 20)
            scaled = replace(form, scales=form.scales * (8 if bits < 8 else 0.5))
            linears[name.removesuffix(".weight")] = pack(scaled)
        else:
            tensors[name] = weight
    return VariantWeights(config.to_dict(), tensors, linears, dtype)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_row_of_codes_is_a_row_of_a_batch(bits: int) -> None:
    """Digits against numbers, in steps that are launched, captured and replayed."""
    model = build_model(_coded(bits), device="cuda")
    pool = make_pool(model.layout, 64, 4, "cuda")
    runner = runners.make_runner(model, pool, max_batch=4)
    assert isinstance(runner, CudaRunner)
    seq, other = _start([9, 3])
    runner.prefill([Chunk(seq, 0, 8), Chunk(other, 0, 2)], [False, False])
    for _ in range(4):
        alone = runner.decode([seq])
        both = runner.decode([seq, other])
        assert bool(alone.isfinite().all())
        assert error(alone, both[:1]) < 0.03
        seq.tokens.append(int(both[0].argmax()))
