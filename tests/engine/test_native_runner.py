"""Thin steps on the CPU: transformers' logits, whatever the level, the batch and the chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressors.forms.corrected import Corrected
from compressors.forms.outlier import Outlier
from compressors.forms.rotated import Rotated, mixed
from compressors.forms.scaled import Scaled
from compressors.kv_scheme import KVScheme
from compressors.quantize import rtn
from compressors.tensor import Dense, LowRank, StoredLinear
from gateway.engine import native_runner, runners
from gateway.engine.kernels.store import pack
from gateway.engine.kv_quant import make_pool
from gateway.engine.native_step import operations
from gateway.engine.runner import Model, Runner, VariantWeights, build_model, forward_logits
from gateway.engine.runners import StepRunner, make_runner
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens
from tests.engine.conftest import VOCAB, weights_of

pytestmark = pytest.mark.skipif(operations() is None, reason="no native steps on this host")
Checkpoints = Callable[[str], Path]
IDS = torch.randint(0, VOCAB, (4, 60), generator=torch.Generator().manual_seed(3)).tolist()
SIZE = 8
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def thin(model: Model, batch: int = 4) -> StepRunner:
    pool = make_pool(model.layout, 80, SIZE, "cpu")
    runner = native_runner.make(model, pool, batch)
    assert runner is not None
    return runner


def sequence(model: Model, index: int, length: int) -> Tokens:
    """Row `index` of IDS with blocks of its own."""
    tail, size = model.layout.tail_blocks, model.layout.block_size(SIZE)
    first = 1 + index * 16
    blocks = list(range(first + tail, first + tail - (-60 // size)))
    return Tokens(
        "", length, 0, IDS[index][:length], blocks=blocks, tail=list(range(first, first + tail))
    )


def prompt(runner: StepRunner, seq: Tokens, cuts: tuple[int, ...] = ()) -> Tensor:
    """Logits after every token of a prompt in chunks."""
    ends = [*cuts, len(seq.tokens)]
    starts = [0, *cuts]
    return torch.cat(
        [
            runner.prefill([Chunk(seq, start, end - start)], [True])[0]
            for start, end in zip(starts, ends, strict=True)
        ]
    )


def ends_of(runner: StepRunner, seqs: list[Tokens], steps: int = 3) -> Tensor:
    """Logits [steps, batch, vocab] of a packed prefill's ends and of decode steps after it."""
    chunks = [Chunk(seq, 0, len(seq.tokens)) for seq in seqs]
    rows = [torch.cat(runner.prefill(chunks, [False] * len(chunks)))]
    for _ in range(steps - 1):
        for seq in seqs:
            seq.tokens.append(IDS[0][len(seq.tokens)])
        rows.append(runner.decode(seqs))
    return torch.stack(rows)


def both(model: Model, lengths: tuple[int, ...] = (21, 1, 33)) -> tuple[Tensor, Tensor]:
    """What the thin and the eager runner say to the same steps."""

    def seqs() -> list[Tokens]:
        return [sequence(model, i, length) for i, length in enumerate(lengths)]

    ours = ends_of(thin(model), seqs())
    pool = make_pool(model.layout, 80, SIZE, "cpu")
    return ours, ends_of(Runner(model, pool, max_batch=4), seqs())


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Of logits, relative."""
    centred = wanted - wanted.mean(-1, keepdim=True)
    return float((found - wanted).norm() / centred.norm())


@pytest.mark.parametrize("bits", [None, 8])
def test_a_default_dtype_of_another_thread_changes_nothing(
    checkpoint: Checkpoints, bits: int | None
) -> None:
    """transformers sets the whole process's while it builds a model, beside running steps."""
    kv = None if bits is None else KVScheme(bits=bits)
    model = build_model(replace(weights_of(checkpoint("llama")), kv=kv))
    before = ends_of(thin(model), [sequence(model, 0, 21)])
    torch.set_default_dtype(torch.bfloat16)
    try:
        beside = ends_of(thin(model), [sequence(model, 0, 21)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert beside.dtype is torch.float32
    assert torch.equal(before, beside)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_steps_are_the_eager_ones(checkpoint: Checkpoints, family: str) -> None:
    ours, theirs = both(build_model(weights_of(checkpoint(family))))
    close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_nearer_to_the_truth_than_eager_bf16(checkpoint: Checkpoints, family: str) -> None:
    """The residual, norms and rotations stay in float32."""
    weights = weights_of(checkpoint(family), dtype=torch.bfloat16)
    tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
    exact, _ = both(build_model(VariantWeights(weights.config, tensors, {}, torch.float32)))
    ours, theirs = both(build_model(weights))
    assert difference(ours, exact) < difference(theirs, exact) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_what_the_whole_prompt_gives(checkpoint: Checkpoints, family: str) -> None:
    model = build_model(weights_of(checkpoint(family)))
    wanted = forward_logits(model, torch.tensor(IDS[:1]))[0]
    runner = thin(model)
    for cuts in ((), (1,), (13, 14, 40), (59,)):
        found = prompt(runner, sequence(model, 0, 60), cuts)
        close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_feel_the_others(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    """Bit for bit where linears are native, in any batch, at any place, on any threads."""
    model = build_model(weights_of(checkpoint("llama"), dtype=dtype))
    runner, lengths = thin(model), (7, 30, 19, 11)
    seqs = [sequence(model, i, length) for i, length in enumerate(lengths)]
    runner.prefill([Chunk(seq, 0, len(seq.tokens)) for seq in seqs], [False] * 4)
    together = runner.decode(seqs)
    shuffled = runner.decode([seqs[2], seqs[0]])
    alone = [runner.decode([seq]) for seq in seqs]
    bound = 0.0 if dtype is torch.bfloat16 else 1e-5
    assert difference(torch.cat(alone), together) <= bound
    assert difference(shuffled, together[[2, 0]]) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_gives_what_two_give(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    model = build_model(weights_of(checkpoint("llama"), dtype=dtype))
    runner, lengths = thin(model), (7, 30, 19, 11)
    seqs = [sequence(model, i, length) for i, length in enumerate(lengths)]
    runner.prefill([Chunk(seq, 0, len(seq.tokens) - 1) for seq in seqs[:2]], [False] * 2)
    chunks = [Chunk(seqs[2], 0, 19), Chunk(seqs[3], 0, 8)]
    decoded, prefilled = runner.decode(seqs[:2]), runner.prefill(chunks, [True, False])
    together = runner.mixed(seqs[:2], chunks, [True, False])  # type: ignore[attr-defined]
    assert together is not None
    bound = 0.0 if dtype is torch.bfloat16 else 1e-5
    assert difference(together[0], decoded) <= bound
    for one, two in zip(together[1], prefilled, strict=True):
        assert one.shape == two.shape
        assert difference(one, two) <= bound


def test_one_pass_is_refused_where_rows_go_other_ways(checkpoint: Checkpoints) -> None:
    """A quantized pool attends to decode steps and to prompts by different code."""
    model = build_model(replace(weights_of(checkpoint("llama")), kv=KVScheme(8)))
    runner, seq = thin(model), sequence(model, 0, 20)
    chunk = Chunk(sequence(model, 1, 20), 0, 20)
    assert runner.mixed([seq], [chunk], [False]) is None  # type: ignore[attr-defined]


def test_block_tables_follow_sequences(checkpoint: Checkpoints) -> None:
    """Rows that change places, and a sequence that comes back in other blocks."""
    model = build_model(weights_of(checkpoint("llama")))
    runner, seqs = thin(model), [sequence(model, i, 20) for i in range(3)]
    wanted = forward_logits(model, torch.tensor([row[:20] for row in IDS[:3]]))[:, -1]
    for order in ([0, 1, 2], [2, 0], [1], [1, 2, 0]):
        batch = [seqs[i] for i in order]
        runner.prefill([Chunk(seq, 0, 19) for seq in batch], [False] * len(batch))
        close(runner.decode(batch), wanted[order])
        for seq in batch:
            seq.blocks = seq.blocks[::-1]


def test_a_longer_prompt_than_ever_grows_the_buffers(checkpoint: Checkpoints) -> None:
    model = build_model(weights_of(checkpoint("llama")))
    runner = thin(model, batch=1)
    before = runner.decode([sequence(model, 1, 1)])
    found = prompt(runner, sequence(model, 0, 60))
    close(found, forward_logits(model, torch.tensor(IDS[:1]))[0])
    assert torch.equal(runner.decode([sequence(model, 1, 1)]), before)


def test_logits_outlive_the_next_step(checkpoint: Checkpoints) -> None:
    model = build_model(weights_of(checkpoint("llama")))
    runner, seqs = thin(model), [sequence(model, i, 1) for i in range(2)]
    first = runner.decode(seqs[:1])
    copy = first.clone()
    runner.decode(seqs[1:])
    assert torch.equal(first, copy)


def _linears(weights: VariantWeights) -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in weights.tensors.items()
        if name.endswith("_proj.weight")
    }


def _scaled(weight: Tensor) -> StoredLinear:
    by = torch.linspace(0.5, 2.0, weight.shape[1])
    return pack(Scaled(Dense((weight / by).to(weight.dtype)), by))


def _factors(weight: Tensor, rank: int = 16) -> tuple[Dense, Dense]:
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    left, right = u[:, :rank] * s[:rank], v[:rank]
    return Dense(left.to(weight.dtype)), Dense(right.to(weight.dtype))


def _lowrank(weight: Tensor) -> StoredLinear:
    return pack(LowRank(*_factors(weight)))


def _rotated(weight: Tensor) -> StoredLinear:
    signs = torch.randint(0, 2, (weight.shape[1],), generator=torch.Generator().manual_seed(1))
    signs = (signs * 2 - 1).to(torch.int8)
    turned = mixed(weight.float() * signs, 16).to(weight.dtype)
    return pack(Rotated(rtn.solve(turned.float(), bits=8, group=16), signs, 16))


def _outlier(weight: Tensor) -> StoredLinear:
    columns = torch.tensor([3, 11, 30], dtype=torch.int32)
    rest = weight.float()
    rest[:, columns] = 0.0
    values = Dense(weight[:, columns].contiguous())
    return pack(Outlier(rtn.solve(rest, bits=8, group=16), values, columns))


def _corrected(weight: Tensor) -> StoredLinear:
    base = rtn.solve(weight.float(), bits=4, group=16)
    return pack(Corrected(base, LowRank(*_factors(weight))))


@pytest.mark.parametrize("form", [_scaled, _lowrank, _rotated, _outlier, _corrected])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_several_parts(
    checkpoint: Checkpoints, form: Callable[[Tensor], StoredLinear], dtype: torch.dtype
) -> None:
    weights = weights_of(checkpoint("llama"), dtype=dtype)
    linears = {name: form(weight) for name, weight in _linears(weights).items()}
    rest = {k: v for k, v in weights.tensors.items() if not k.endswith("_proj.weight")}
    ours, theirs = both(build_model(VariantWeights(weights.config, rest, linears, weights.dtype)))
    # Inputs that are rounded to eight bits turn a last place into a step now and then.
    assert difference(ours, theirs) < (0.01 if dtype is torch.float32 else 0.2)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_keys_and_values(checkpoint: Checkpoints, bits: int) -> None:
    weights = weights_of(checkpoint("llama"))
    scheme = KVScheme(bits)
    ours, theirs = both(
        build_model(VariantWeights(weights.config, weights.tensors, {}, torch.float32, kv=scheme))
    )
    assert difference(ours, theirs) < 1e-3


def test_without_native_code_the_module_runs(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(weights_of(checkpoint("llama")))
    pool = make_pool(model.layout, 4, SIZE, "cpu")
    assert isinstance(make_runner(model, pool, max_batch=1), native_runner.NativeRunner)
    monkeypatch.setenv("PRESSGATE_NATIVE", "0")
    assert isinstance(make_runner(model, pool, max_batch=1), Runner)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_before_serving_agrees(checkpoint: Checkpoints, family: str) -> None:
    model = build_model(weights_of(checkpoint(family)))
    assert runners.settle(model).decoder is model.decoder
    assert isinstance(model.module, nn.Module)
