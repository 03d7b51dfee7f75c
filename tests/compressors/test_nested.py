"""Two precisions in one weight: the child is the base method's own, the parent near int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressors import gram
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.forms.nested import Nested
from compressors.memory import MemorySink
from compressors.pipeline import compress
from compressors.quantize import gptq, hqq, nested, rtn
from compressors.recipe import Recipe
from compressors.tensor import LinearForm

MakeCheckpoint = Callable[..., Path]


def layer(n: int = 24, k: int = 80, tokens: int = 400) -> tuple[Tensor, Tensor, gram.Gram]:
    """A weight, correlated inputs and their statistic."""
    weight, mixing = torch.randn(n, k), torch.eye(k) + torch.randn(k, k) / (2 * k**0.5)
    x = torch.randn(tokens, k) @ mixing * (torch.rand(k) + 0.1)
    statistic = gram.empty(k)
    gram.accumulate(statistic, x)
    return weight, x, statistic


def error(x: Tensor, weight: Tensor, form: LinearForm) -> float:
    return float((x @ (weight - form.dense()).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("group", [16, 32, 80])
def test_the_child_is_what_the_base_gives_and_the_parent_close_to_eight_bits(group: int) -> None:
    torch.manual_seed(group)
    for _ in range(5):
        weight, x, statistic = layer()
        form = nested.solve(weight, statistic, high=gptq.solve, group=group)
        alone = gptq.solve(weight, statistic, bits=4, group=group)
        assert torch.equal(form.child.codes, alone.codes)
        assert torch.equal(form.child.dense(), alone.dense())
        assert int(form.low.max()) <= 15
        int4, int8 = error(x, weight, alone), error(x, weight, rtn.solve(weight, bits=8, group=80))
        assert error(x, weight, form) < 0.35 * int4
        assert error(x, weight, form) < 4 * int8


def test_the_parent_is_the_form_s_equation() -> None:
    """W[n,k] = scale/8 · (8·(code − zero) + low − 8), in loops."""
    torch.manual_seed(0)
    weight, _, statistic = layer(5, 40)
    form = nested.solve(weight, statistic, high=gptq.solve, group=16)
    expected = torch.empty(5, 40, dtype=torch.float64)
    for row in range(5):
        for column in range(40):
            scale = float(form.child.scales[row, column // 16])
            high = int(form.child.codes[row, column]) - float(form.child.zeros[row, column // 16])
            expected[row, column] = scale / 8 * (8 * high + int(form.low[row, column]) - 8)
    torch.testing.assert_close(form.dense(torch.float64), expected, rtol=1e-6, atol=1e-7)


def test_without_text_the_residual_is_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 48)
    form = nested.solve(weight, None, high=hqq.solve, group=16)
    assert torch.equal(form.child.codes, hqq.solve(weight, None, bits=4, group=16).codes)
    rest = (weight - form.child.dense()).double()
    steps = (form.child.scales / 8)[:, torch.arange(48) // 16].double()
    choices = steps.unsqueeze(-1) * (torch.arange(16) - 8)
    best = (choices - rest.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((weight - form.dense()).abs().double(), best, rtol=1e-4, atol=1e-6)


def test_both_precisions_take_no_more_than_a_twentieth_over_int8() -> None:
    torch.manual_seed(0)
    weight, _, statistic = layer(64, 512, 100)
    form = nested.solve(weight, statistic, high=gptq.solve, group=128)
    assert form.nbytes <= 1.05 * rtn.solve(weight, bits=8, group=512, symmetric=True).nbytes
    assert form.stored_as(torch.bfloat16).nbytes == form.nbytes


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_either_level_builds_the_same_parent(arch: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint(arch))
    calibration = Calibration(torch.randint(0, 97, (4, 32)), "random")
    sinks = []
    for child in ("", "@int4"):
        sinks.append(MemorySink())
        recipe = Recipe.parse(f"nested84-gptq-g16{child}")
        compress(checkpoint, recipe, sink=sinks[-1], calibration=calibration)
    for name, form in sinks[0].linears.items():
        other = sinks[1].linears[name]
        assert isinstance(form, Nested)
        assert isinstance(other, Nested)
        assert torch.equal(form.low, other.low)
        assert torch.equal(form.child.codes, other.child.codes)
