"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): quantize column by column, repair with the rest.

With H = XXᵀ + λI of the layer's inputs and U the upper Cholesky factor of H⁻¹, for each column j
(algorithm 1; eqs. 2 and 3 with the inverse read off U):

    e = (w_j − quant(w_j)) / U_jj,     W_:,j+1: ← W_:,j+1: − e · U_j,j+1:

Updates beyond a block of columns are applied once per block (section 3.2, lazy batches). Grids are
made beforehand (the authors' `--static-groups`), so that with `act_order`, columns by falling input
energy (diagonal of H), every column keeps its natural group and kernels need no permutation. Pure
tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors import gram as grams
from compressors.gram import Gram, accumulate, empty
from compressors.quantize import rtn
from compressors.tensor import Grouped

__all__ = ["accumulate", "empty", "solve"]

_BLOCK = 128


def solve(
    weight: Tensor,
    statistic: Gram,
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    act_order: bool = True,
    search: bool = True,
    damping: float = 0.01,
    mask: Tensor | None = None,
    grid: tuple[Tensor, Tensor] | None = None,
) -> Grouped:
    """Quantize weight [N, K] (float32) for inputs with the given statistic.

    Args:
        group: columns per grid; the last group may be short.
        search: fit each grid's range to its weights; else it spans them, as round-to-nearest does.
        damping: λ as a share of H's mean diagonal; raised until H factors.
        mask: bool [N, K], equally many True in every row; where False the weight becomes zero and
            its loss is repaired like any rounding error (the joint case of SparseGPT,
            arXiv:2301.00774). Groups then run over the kept weights of a row, and the form is of
            these, [N, kept].

        grid: scales and zeros [N, G] to use instead of grids of its own.

    Raises:
        ValueError: the statistic is not finite.
    """
    factor, order = _factor(statistic, act_order, damping)
    kept = weight if mask is None else weight[mask].view(len(weight), -1)
    if grid is not None:
        scales, zeros = grid
    elif search:
        scales, zeros = rtn.fitted_grid(kept, bits, group, symmetric)
    else:
        scales, zeros = rtn.grid(*rtn.group_range(kept, group), bits, symmetric)
    # Transposed, so that a column of the layer is contiguous.
    work = weight.t()[order].contiguous()
    keep = None if mask is None else mask.t()[order].contiguous()
    s, z = (_by_column(part, group, mask, order) for part in (scales, zeros))
    codes = torch.empty_like(work, dtype=torch.uint8)
    for start in range(0, len(work), _BLOCK):
        end = min(start + _BLOCK, len(work))
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            codes[j] = rtn.encode(work[j], s[j], z[j], bits)
            rounded = s[j] * (codes[j] - z[j])
            if keep is not None:
                rounded = rounded * keep[j]
            error = (work[j] - rounded) / factor[j, j]
            work[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1.0)
            errors[j - start] = error
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1.0)
    codes = codes[torch.argsort(order)].t().contiguous()
    if mask is not None:
        codes = codes[mask].view(len(kept), -1)
    return Grouped(codes, scales, zeros, bits, group)


def _by_column(grid: Tensor, group: int, mask: Tensor | None, order: Tensor) -> Tensor:
    """Scales or zeros [N, G] of every weight, transposed and in `order`: [K, N]."""
    if mask is None:
        return grid.t()[order // group].contiguous()
    index = mask.cumsum(1).sub_(1).clamp_(min=0).div_(group, rounding_mode="floor")
    return grid.gather(1, index).t()[order].contiguous()


def _factor(statistic: Gram, act_order: bool, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of H⁻¹ and the column order it is for."""
    order = torch.arange(statistic.matrix.shape[0], device=statistic.matrix.device)
    if act_order:
        order = torch.argsort(statistic.matrix.diagonal(), descending=True, stable=True)
        statistic = Gram(statistic.matrix[order][:, order], statistic.tokens)
    return grams.inverse_factor(statistic, damping), order
