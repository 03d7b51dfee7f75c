"""Low-rank correction: the best one there is, with text and without, and kept in a level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressors import gram
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.forms.corrected import Corrected
from compressors.lowrank import lorc
from compressors.memory import MemorySink
from compressors.pipeline import compress
from compressors.quantize import rtn
from compressors.recipe import Recipe, RecipeError
from compressors.tensor import Grouped, LinearForm

MakeCheckpoint = Callable[..., Path]


def quantized(n: int, k: int) -> tuple[Tensor, Grouped, Tensor, gram.Gram]:
    """A weight, what two bits leave of it, correlated inputs [tokens, K] and their statistic."""
    weight, x = torch.randn(n, k), torch.randn(500, k) @ torch.randn(k, k) / k**0.5
    statistic = gram.empty(k)
    gram.accumulate(statistic, x)
    return weight, rtn.solve(weight, bits=2, group=16), x, statistic


def left(weight: Tensor, form: LinearForm, x: Tensor) -> float:
    return float(((weight - form.dense()).double() @ x.double().T).norm())


@pytest.mark.parametrize(("n", "k"), [(40, 64), (64, 40)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_with_text_nothing_of_that_rank_leaves_less(n: int, k: int, rank: int) -> None:
    """What is left is the tail of the singular values of E X (Eckart and Young), in float64."""
    torch.manual_seed(rank)
    weight, form, x, statistic = quantized(n, k)
    corrected = lorc.solve(weight, statistic, form=form, rank=rank)
    error = (weight - form.dense()).double() @ x.double().T
    best = float(torch.linalg.svdvals(error)[rank:].norm())
    assert best * (1 - 1e-6) <= left(weight, corrected, x) < 1.01 * best  # factors have 8 bits
    plain = lorc.solve(weight, None, form=form, rank=rank)
    assert left(weight, corrected, x) < left(weight, plain, x) < left(weight, form, x)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_without_text_it_is_the_svd_of_the_error(rank: int) -> None:
    torch.manual_seed(rank)
    weight, form, _, _ = quantized(40, 64)
    corrected = lorc.solve(weight, None, form=form, rank=rank)
    assert isinstance(corrected, Corrected)
    u, s, vt = torch.linalg.svd((weight - form.dense()).double())
    expected = form.dense().double() + (u[:, :rank] * s[:rank]) @ vt[:rank]
    distance = (corrected.dense(torch.float64) - expected).norm()
    assert float(distance) < 0.02 * float(s[:rank].norm())
    assert corrected.correction.rank == rank
    assert corrected.nbytes == form.nbytes + rank * (40 + 64) + 2 * (40 + rank)


def test_a_layer_too_small_for_factors_is_left_as_it_is() -> None:
    weight, form, _, _ = quantized(8, 16)
    assert lorc.solve(weight, None, form=form, rank=6) is form


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("base", ["int3-gptq-g16", "int2-hqq-g16", "sparse24-wanda+int4-rtn-g16"])
def test_levels(base: str, arch: str, make_checkpoint: MakeCheckpoint) -> None:
    torch.manual_seed(0)
    checkpoint = Checkpoint(make_checkpoint(arch))
    calibration = Calibration(torch.randint(0, 97, (8, 32)), "random")
    errors = []
    for level in (base, f"{base}+lorc-4"):
        sink = MemorySink()
        report = compress(checkpoint, Recipe.parse(level), sink=sink, calibration=calibration)
        errors.append([layer.relative_error for layer in report.layers])
    assert all(isinstance(form, Corrected) for form in sink.linears.values())
    assert sum(errors[1]) < 0.9 * sum(errors[0])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lorc-16", "none comes before"),
        ("int3-gptq-g128+lorc-0", "1 to 1024"),
        ("lowrank-80+int8+lorc-4", "what lowrank-80 leaves"),
        ("nested84-gptq-g128+lorc-16", "nested weights have two"),
        ("lorc-16+int3-gptq-g128", r"int3-gptq-g128\+lorc-16"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(name)


def test_one_recipe_has_one_name() -> None:
    recipe = Recipe.parse("int3-gptq-g128+lorc-16")
    assert recipe.name == "int3-gptq-g128+lorc-16"
    assert recipe.needs_calibration
    assert not Recipe.parse("int2-hqq-g64+lorc-32").needs_calibration
