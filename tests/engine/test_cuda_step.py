"""The CUDA step: its kernels against float64, and whole models against transformers.

On a CUDA device where there is one (marker gpu); on the CPU through Triton's interpreter, where
Triton is installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gateway.engine import runners
from gateway.engine.attention import PlainKV, Pool
from gateway.engine.core import Job
from gateway.engine.cuda import attend, kernels
from gateway.engine.cuda.graphs import Graphs
from gateway.engine.cuda.matvec import gated_matvec, matvec
from gateway.engine.cuda.prompts import PromptSteps
from gateway.engine.cuda.step import CudaRunner
from gateway.engine.cuda.weights import Joined
from gateway.engine.decoder import Norm, Rotary
from gateway.engine.kv_quant import make_pool
from gateway.engine.runner import Model, Runner, build_model
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

Checkpoints = Callable[[str], Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")

_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off"
)
_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=_interpreted),
        pytest.param("cuda", marks=[pytest.mark.gpu, _cuda]),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(runners.THIN, request.param, "gateway.engine.cuda.runner")
    torch.manual_seed(0)
    return str(request.param)


def _error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def _rms(x: Tensor, norm: Norm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


@pytest.mark.parametrize("n", [48, 128, 200])
@pytest.mark.parametrize("added", [True, False])
def test_norm_of_a_sum_keeps_the_sum(device: str, n: int, added: bool) -> None:
    x, delta = torch.randn(2, 5, n, device=device)
    norm = Norm(torch.rand(n, device=device) + 0.5, 1e-5)
    total = x.double() + (delta.double() if added else 0.0)
    found = kernels.add_norm(x, delta if added else None, norm)
    assert _error(found, _rms(total, norm)) < 1e-6
    assert _error(x, total) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_times_up(device: str, activation: str) -> None:
    both = torch.randn(3, 2 * 1100, device=device) * 4
    gate, up = both.split(1100, -1)
    g = gate.double()
    active = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    assert _error(kernels.gated(gate, up, activation), active * up.double()) < 1e-6


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 12), (6, 1, 16), (5, 5, 40)])
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_and_storage(
    device: str, heads: int, kv_heads: int, dim: int, normed: bool
) -> None:
    rows, size = 7, 4
    parts = [heads * dim, kv_heads * dim, kv_heads * dim]
    packed = torch.randn(rows, sum(parts), device=device)
    before = [part.double() for part in packed.split(parts, -1)]
    norms = (
        Norm(torch.rand(dim, device=device) + 0.5, 1e-6),
        Norm(torch.rand(dim, device=device) + 0.5, 1e-6),
    )
    rotary = Rotary(torch.rand(dim // 2, device=device), 1.25)
    positions = torch.tensor([0, 1, 2, 90, 91, 200, 7], dtype=torch.int32, device=device)
    writes = torch.tensor([4, 5, 6, 7, 20, 9, 13], dtype=torch.int32, device=device)
    keys, values = torch.full((2, 6, size, kv_heads, dim), 9.0, device=device)
    query, key, value = packed.split(parts, -1)
    kernels.turn_and_store(
        (query, key, value),
        kernels.Turn(norms if normed else None, rotary),
        (positions, writes),
        (keys, values),
    )

    def turned(x: Tensor, norm: Norm) -> Tensor:
        x = x.view(rows, -1, dim)
        x = _rms(x, norm) if normed else x
        angle = (positions.double()[:, None] * rotary.frequency.double())[:, None]
        low, high = x.chunk(2, -1)
        cos, sin = angle.cos() * rotary.scale, angle.sin() * rotary.scale
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    assert _error(query, turned(before[0], norms[0]).flatten(1)) < 1e-5
    at = writes.long()
    assert _error(keys.flatten(0, 1)[at], turned(before[1], norms[1])) < 1e-5
    assert _error(values.flatten(0, 1)[at], before[2].view(rows, kv_heads, dim)) < 1e-6
    untouched = [i for i in range(24) if i not in set(at.tolist())]
    assert bool((keys.flatten(0, 1)[untouched] == 9).all())
    assert bool((values.flatten(0, 1)[untouched] == 9).all())


@pytest.mark.parametrize(("n", "k"), [(7, 48), (16, 1024), (33, 1500)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_of_a_product(device: str, n: int, k: int, bias: bool) -> None:
    x, weight = torch.randn(1, k, device=device), torch.randn(n, k, device=device)
    offset = torch.randn(n, device=device) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert _error(matvec(x, weight, offset), wanted) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "k"), [(7, 48), (33, 1500)])
def test_one_row_through_gate_and_up(device: str, n: int, k: int, activation: str) -> None:
    x, weight = torch.randn(1, k, device=device), torch.randn(2 * n, k, device=device) * k**-0.5
    gate, up = F.linear(x.double(), weight.double()).split(n, -1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    assert _error(gated_matvec(x, weight, activation), active * up) < 1e-5


class _Paged:
    """Random keys and values of sequences of some lengths in shuffled blocks, and in order."""

    def __init__(self, lengths: list[int], kv_heads: int, dim: int, device: str) -> None:
        self.size = 4
        self.width = -(-max(lengths) // self.size) + 3
        blocks = torch.randperm(len(lengths) * self.width) + 1
        self.rows = blocks.view(len(lengths), self.width)
        shape = (len(blocks) + 1, self.size, kv_heads, dim)
        self.pool = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.tables = (
            self.rows.to(torch.int32).flatten().to(device),
            torch.tensor([self.width], dtype=torch.int32, device=device),
        )

    def of(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """float64 [length, kv_heads, dim] each."""
        keys, values = (p[self.rows[row].to(p.device)].flatten(0, 1) for p in self.pool)
        return keys[:length].double(), values[:length].double()


def _attended(q: Tensor, keys: Tensor, values: Tensor, at: int, shape: attend.Shape) -> Tensor:
    """One query [heads · dim] at position `at`, naively in float64."""
    heads = q.double().view(shape.heads, -1)
    shared = shape.heads // keys.shape[1]
    first = max(0, at + 1 - shape.window) if shape.window else 0
    k = keys[first : at + 1].repeat_interleave(shared, 1)
    v = values[first : at + 1].repeat_interleave(shared, 1)
    weights = (torch.einsum("hd,nhd->hn", heads, k) * shape.scale).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v).flatten()


@pytest.mark.parametrize(("both", "dim"), [((4, 2), 12), ((8, 1), 16), ((5, 5), 40)])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding_attends_to_its_own_context(
    device: str, both: tuple[int, int], dim: int, window: int, splits: int
) -> None:
    heads, kv_heads = both
    lengths = [1, 64, 65, 200]
    paged = _Paged(lengths, kv_heads, dim, device)
    query = torch.randn(4, heads * dim + 8, device=device)[:, : heads * dim]
    scratch = attend.make_scratch(4, heads, kv_heads, dim, torch.device(device))
    setting = attend.Shape(heads, 0.3, window), replace(scratch, splits=splits)
    positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    for _ in range(2):  # what one launch leaves in the scratch must not disturb the next
        found = attend.decode(query, positions, paged.pool, paged.tables, setting)
        for row, length in enumerate(lengths):
            keys, values = paged.of(row, length)
            wanted = _attended(query[row], keys, values, length - 1, setting[0])
            assert _error(found[row], wanted) < 1e-5


@pytest.mark.parametrize("window", [0, 50])
def test_packed_chunks_attend_to_their_own_context(device: str, window: int) -> None:
    heads, kv_heads, dim = 4, 2, 12
    chunks = [(0, 70), (130, 3), (64, 64)]  # start, length
    paged = _Paged([start + length for start, length in chunks], kv_heads, dim, device)
    tiles, begin = [], 0
    for table, (start, length) in enumerate(chunks):
        for off in range(0, length, attend.QUERIES):
            tiles.append([begin + off, min(attend.QUERIES, length - off), start + off, table])
        begin += length
    query = torch.randn(begin, heads * dim, device=device)
    shape = attend.Shape(heads, 0.3, window)
    found = attend.prefill(
        query,
        paged.pool,
        paged.tables,
        torch.tensor(tiles, dtype=torch.int32, device=device),
        shape,
    )
    row = 0
    for table, (start, length) in enumerate(chunks):
        keys, values = paged.of(table, start + length)
        for at in range(start, start + length):
            assert _error(found[row], _attended(query[row], keys, values, at, shape)) < 1e-5
            row += 1


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
        assert _error(left, right) < 1e-3


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
                assert _error(left, right) < 1e-5
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
@_cuda
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
@_cuda
def test_a_step_that_waits_for_the_device_is_not_captured() -> None:
    source = torch.ones(8, device="cuda")
    graphs = Graphs(lambda rows: source[:rows] * float(source.sum()), enabled=True)
    for _ in range(3):
        assert graphs.run(2).tolist() == [8.0, 8.0]
    assert graphs.sizes == []
