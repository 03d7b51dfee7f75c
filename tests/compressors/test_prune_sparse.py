"""Half sparsity: SparseGPT and Wanda against the papers in float64, forms, whole jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressors.forms.sparse import Bitmap
from compressors.memory import materialize
from compressors.prune import magnitude, sparsegpt, wanda
from compressors.quantize import gptq
from compressors.tensor import Dense, Grouped, LinearForm, Sparse24
from tests.compressors.layers import draw, statistic
from tests.compressors.test_pipeline import logits, run

PATTERNS = pytest.mark.parametrize("pattern", ["24", "48", "50"])


def groups_of(columns: int, size: int) -> list[range]:
    return [range(start, min(start + size, columns)) for start in range(0, columns, size)]


def naive_best(score: list[float], group: range) -> set[int]:
    """The better half of a group, the first on a tie; the larger half of an odd number."""
    return set(sorted(group, key=lambda k: (-score[k], k))[: (len(group) + 1) // 2])


def naive_mask(score: Tensor, size: int) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    for n, row in enumerate(score.tolist()):
        for group in groups_of(len(row), size):
            for k in naive_best(row, group):
                mask[n, k] = True
    return mask


def naive_sparsegpt(weight: Tensor, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The optimal brain surgeon from left to right: (mask, weight with what stays repaired).

    For every column the inverse Hessian of it and the columns right of it is taken anew.
    """
    w, hessian = weight.double().clone(), x.double().t() @ x.double() / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    rows, columns = w.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    mask = torch.ones_like(w, dtype=torch.bool)
    for group in groups_of(columns, size):
        chosen = w.clone()
        for n in range(rows):
            # Masks of a group are settled when the sweep arrives at its first column.
            score = [0.0] * columns
            for k in group:
                score[k] = float(chosen[n, k] ** 2 / inverses[k][0, 0])
            for k in set(group) - naive_best(score, group):
                mask[n, k] = False
        for j in group:
            for n in range(rows):
                if not mask[n, j]:
                    error = w[n, j] / inverses[j][0, 0]
                    w[n, j:] -= error * inverses[j][0]
                    w[n, j] = 0
    return mask, w


@PATTERNS
@pytest.mark.parametrize("columns", [40, 136])
def test_sparsegpt_is_the_paper(pattern: str, columns: int) -> None:
    weight, x = draw(3, n=4, k=columns, tokens=400)
    mask, expected = naive_sparsegpt(weight, x, magnitude.GROUPS[pattern] or 128)
    form = sparsegpt.solve(weight, statistic(x), pattern=pattern)
    assert torch.equal(magnitude.mask_of(form), mask)
    torch.testing.assert_close(form.dense().double(), expected, rtol=1e-3, atol=1e-3)


@PATTERNS
@pytest.mark.parametrize("columns", [36, 40])
def test_wanda_compares_inside_a_row(pattern: str, columns: int) -> None:
    weight, x = draw(2, k=columns)
    energy = wanda.empty(columns)
    for part in x.split(50):
        wanda.accumulate(energy, part)
    score = weight.double().abs() * x.double().norm(dim=0)
    mask = naive_mask(score, magnitude.GROUPS[pattern] or columns)
    form = wanda.solve(weight, energy, pattern=pattern)
    assert torch.equal(magnitude.mask_of(form), mask)
    assert torch.equal(form.dense(), weight * mask)


@PATTERNS
def test_repairing_beats_looking_at_inputs_beats_looking_at_weights(pattern: str) -> None:
    for seed in range(20):
        weight, x = draw(seed)
        energy = wanda.empty(x.shape[1])
        wanda.accumulate(energy, x)

        def loss(form: LinearForm, weight: Tensor = weight, x: Tensor = x) -> float:
            return float(((weight - form.dense()) @ x.t()).norm())

        repaired = loss(sparsegpt.solve(weight, statistic(x), pattern=pattern))
        seen = loss(wanda.solve(weight, energy, pattern=pattern))
        assert repaired < seen < loss(magnitude.solve(weight, pattern=pattern))


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 43, 130])
@pytest.mark.parametrize("pattern", ["48", "50"])
def test_rows_of_any_width_keep_equally_many(pattern: str, columns: int) -> None:
    weight, x = draw(5, k=columns)
    for form in (
        magnitude.solve(weight, pattern=pattern),
        sparsegpt.solve(weight, statistic(x), pattern=pattern),
    ):
        assert isinstance(form, Bitmap)
        kept = form.values.shape[1]
        assert columns / 2 <= kept <= columns / 2 + 1
        assert (form.mask.sum(1) == kept).all()


def test_half_takes_nine_sixteenths_of_the_bytes() -> None:
    weight, _ = draw(6, n=32, k=64)
    form = magnitude.solve(weight, pattern="50").stored_as(torch.bfloat16)
    assert form.nbytes == 9 * Dense(weight.bfloat16()).nbytes // 16
    assert torch.equal(form.dense(torch.bfloat16), (weight * magnitude.mask_of(form)).bfloat16())


def test_sparsegpt_survives_dead_and_equal_inputs() -> None:
    weight, x = draw(9, tokens=10)  # fewer tokens than columns: singular
    x[:, 3] = 0
    x[:, 5] = x[:, 6]
    for inputs in (x, torch.zeros_like(x)):
        form = sparsegpt.solve(weight, statistic(inputs), pattern="24")
        assert torch.isfinite(form.dense()).all()
    bad = statistic(x)
    bad.matrix[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt.solve(weight, bad, pattern="24")


@PATTERNS
def test_codes_of_kept_weights_have_groups_of_their_own(pattern: str) -> None:
    """GPTQ on a mask: as many scales as groups of kept weights, and a loss near pruning's own."""
    weight, x = draw(12)
    pruned = sparsegpt.solve(weight, statistic(x), pattern=pattern)
    mask = magnitude.mask_of(pruned)
    form = gptq.solve(pruned.dense(), statistic(x), bits=8, group=8, mask=mask)
    assert form.shape == (24, 20)
    assert form.scales.shape == (24, 3)
    dense = torch.zeros_like(weight).masked_scatter(mask, form.dense())
    loss, alone = (float(((weight - w) @ x.t()).norm()) for w in (dense, pruned.dense()))
    assert loss < 1.05 * alone


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "level",
    [
        "sparse24-sparsegpt",
        "sparse48-magnitude",
        "sparse50-sparsegpt",
        "sparse24-wanda+int8",
        "sparse48-wanda+int4-hqq-g8",
        "sparse50-sparsegpt+int4-gptq-g16",
    ],
)
def test_whole_jobs(arch: str, level: str, make_checkpoint: Callable[..., Path]) -> None:
    sink, report = run(make_checkpoint(arch), level)
    assert torch.isfinite(logits(materialize(sink))).all()
    assert report.layers
    for form in sink.linears.values():
        assert isinstance(form, Sparse24 if "sparse24" in level else Bitmap)
        assert isinstance(form.values, Grouped if "+" in level else Dense)
        assert ((form.dense() != 0).sum(1) <= (form.shape[1] + 1) // 2).all()


@pytest.mark.parametrize("level", ["sparse48-wanda", "sparse50-sparsegpt+int4-gptq-g16"])
def test_odd_widths_are_pruned_all_the_same(
    level: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint("llama", hidden_size=36, intermediate_size=43, head_dim=6)
    sink, report = run(folder, level)
    assert torch.isfinite(logits(materialize(sink))).all()
    assert "model.layers.0.mlp.down_proj" in sink.linears
    if level == "sparse48-wanda":
        assert "last group of 8 has 3 columns" in {layer.note for layer in report.layers}
