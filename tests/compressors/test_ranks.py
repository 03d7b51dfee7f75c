"""Ranks by sensitivity: the Fisher losses against autograd, the shares against brute force."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from compressors import gram
from compressors.base import CompressionError
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.lowrank import svd
from compressors.lowrank.sensitivity import allocate, direction_losses
from compressors.memory import MemorySink, materialize
from compressors.model import linears, weight_of
from compressors.pipeline import compress
from compressors.plan import make_plan, open_source
from compressors.ranks import share_ranks
from compressors.recipe import Recipe
from compressors.tensor import LowRank

MakeCheckpoint = Callable[..., Path]


def moments(rows: Tensor) -> gram.Gram:
    statistic = gram.empty(rows.shape[1])
    gram.accumulate(statistic, rows)
    return statistic


def correlated(rows: int, width: int) -> Tensor:
    x: Tensor = torch.randn(rows, width) @ torch.randn(width, width) / width**0.5
    return x


@pytest.mark.parametrize(("n", "k"), [(24, 40), (40, 24), (16, 16)])
def test_the_loss_of_a_rank_is_the_sum_over_what_it_drops(n: int, k: int) -> None:
    torch.manual_seed(0)
    weight, x, g = torch.randn(n, k), correlated(200, k), correlated(200, n)
    losses = direction_losses(weight, moments(x), moments(g))
    inputs, output = (rows.double().T @ rows.double() / 200 for rows in (x, g))
    for rank in (1, 5, 12):
        gone = (weight - svd.solve(weight, moments(x), rank=rank).dense()).double()
        exact = float(torch.trace(output @ gone @ inputs @ gone.T))
        assert float(losses[rank:].sum()) == pytest.approx(exact, rel=1e-3)


def spent(ranks: list[int | None], shapes: list[tuple[int, int]]) -> int:
    pairs = zip(ranks, shapes, strict=True)
    return sum(n * k if rank is None else rank * (n + k) for rank, (n, k) in pairs)


def lost(ranks: list[int | None], losses: list[Tensor]) -> float:
    pairs = zip(ranks, losses, strict=True)
    return sum(0.0 if rank is None else float(curve[rank:].sum()) for rank, curve in pairs)


@pytest.mark.parametrize("percent", [40, 60, 75, 90])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_shares_lose_less(percent: int, seed: int) -> None:
    """Brute force over all ranks: nothing that costs one step less than we spent is better."""
    torch.manual_seed(seed)
    shapes = [(12, 9), (8, 20), (14, 14)]
    falls = [0.3, 1.0, 2.0]
    losses = [
        (torch.rand(min(s)) + 0.5) * torch.arange(1.0, min(s) + 1) ** -fall
        for s, fall in zip(shapes, falls, strict=True)
    ]
    losses = [curve.double() for curve in losses]
    ranks = allocate(losses, shapes, percent)
    budget = sum(n * k for n, k in shapes) * percent // 100
    assert spent(ranks, shapes) <= budget
    choices = [[*range(1, n * k // (n + k) + 1), None] for n, k in shapes]
    largest = max(n * k - rank * (n + k) for rank, (n, k) in zip((1, 1, 1), shapes, strict=True))
    rivals = [
        lost(list(rival), losses)
        for rival in product(*choices)
        if spent(list(rival), shapes) <= budget - largest
    ]
    assert not rivals or lost(ranks, losses) <= min(rivals) + 1e-9
    swaps = [  # at the very same cost or less
        lost(list(rival), losses)
        for rival in product(*choices)
        if spent(list(rival), shapes) <= spent(ranks, shapes)
    ]
    assert lost(ranks, losses) <= 1.25 * min(swaps)  # three layers: steps are large


def test_a_layer_that_matters_gets_more_and_one_that_does_not_next_to_nothing() -> None:
    torch.manual_seed(1)
    curve = torch.rand(64, dtype=torch.float64).sort(descending=True).values
    shapes = [(64, 64)] * 3
    ranks = allocate([curve * 100, curve, curve * 1e-6], shapes, 70)
    assert ranks[0] is None
    assert ranks[2] == 8
    assert ranks[1] is not None
    assert 8 < ranks[1] <= 32
    assert all(rank is None or rank % 8 == 0 for rank in ranks)


def reference_losses(model: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The same by plain autograd through the whole model, in float64."""
    model = model.double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            out.requires_grad_()
            out.retain_grad()
            seen[name] = (args[0].detach(), out)

        return hook

    for name, module in linears(model):
        module.register_forward_hook(watch(name))
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    losses = {}
    for name, (x, out) in seen.items():
        assert out.grad is not None
        rows, grads = x.flatten(0, -2), out.grad.flatten(0, -2)
        weight = weight_of(model.get_submodule(name)).detach()
        whitener = torch.linalg.cholesky(rows.T @ rows / len(rows) + 1e-9 * torch.eye(x.shape[-1]))
        u, s, _ = torch.linalg.svd(weight @ whitener, full_matrices=False)
        losses[name] = s.square() * ((grads @ u).square().mean(0))
    return losses


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_walking_back_block_by_block_is_the_gradient_of_the_whole_model(
    arch: str, make_checkpoint: MakeCheckpoint
) -> None:
    torch.manual_seed(0)
    checkpoint = Checkpoint(make_checkpoint(arch))
    windows = torch.randint(0, 97, (6, 32))
    source = open_source(checkpoint)
    plan = make_plan(source, checkpoint.config, Recipe.parse("lowrank-60"))
    said: list[float] = []
    shared = share_ranks(plan, windows, 60, lambda done, _what: said.append(done))
    assert said == sorted(said)
    sink = MemorySink()
    compress(checkpoint, Recipe.parse("fp32"), sink=sink)
    expected = reference_losses(materialize(sink), windows)
    rows = [row for block in plan.linears for row in block]
    shapes = [row.shape for row in rows]
    best = allocate([expected[row.module] for row in rows], shapes, 60)
    found = [
        row.rank if any(s.kind == "lowrank" for s in row.steps) else None
        for block in shared.linears
        for row in block
    ]
    assert spent(found, shapes) <= sum(n * k for n, k in shapes) * 0.6
    curves = [expected[row.module] for row in rows]
    # Hidden states are kept in 16 bits, so that near ties may fall the other way.
    assert lost(found, curves) <= 1.02 * lost(best, curves)
    uniform: list[int | None] = [svd.rank_of(n, k, 60) for n, k in shapes]
    assert lost(found, curves) < 0.8 * lost(uniform, curves)


def test_a_job_keeps_within_its_share_and_says_what_stayed_whole(
    make_checkpoint: MakeCheckpoint,
) -> None:
    torch.manual_seed(0)
    checkpoint = Checkpoint(make_checkpoint("llama"))
    windows = torch.randint(0, 97, (6, 32))
    sink = MemorySink()
    recipe = Recipe.parse("lowrank-60")
    report = compress(checkpoint, recipe, sink=sink, calibration=Calibration(windows, "random"))
    dense = sum(weight_of(m).numel() for n, m in linears(materialize(sink)) if "layers" in n)
    whole = [name for name, why in report.skipped.items() if "all its ranks" in why]
    kept = sum(sink.tensors[f"{name}.weight"].numel() for name in whole)
    for form in sink.linears.values():
        assert isinstance(form, LowRank)
        kept += form.left.dense().numel() + form.right.dense().numel()
    assert 0.5 * dense < kept <= 0.6 * dense
    assert len({form.rank for form in sink.linears.values() if isinstance(form, LowRank)}) > 2


def test_a_loss_that_is_not_finite_is_told_with_the_linear(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_checkpoint("llama"), tmp_path / "broken")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(float("inf"))
    save_file(tensors, file, metadata={"format": "pt"})
    calibration = Calibration(torch.randint(0, 97, (2, 16)), "random")
    with pytest.raises(CompressionError, match=r"layers\.3\.\S+: the gradients"):
        compress(
            Checkpoint(folder),
            Recipe.parse("lowrank-60"),
            sink=MemorySink(),
            calibration=calibration,
        )
