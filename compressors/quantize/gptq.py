"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): quantize column by column, repair with the rest.

With H = XXᵀ + λI of the layer's inputs and U the upper Cholesky factor of H⁻¹, for each column j
(algorithm 1; eqs. 2 and 3 with the inverse read off U):

    e = (w_j − quant(w_j)) / U_jj,     W_:,j+1: ← W_:,j+1: − e · U_j,j+1:

Updates beyond a block of columns are applied once per block (section 3.2, lazy batches). A group's
grid is made from the already-updated weights when its first column is reached. With `act_order`,
columns go by falling input energy (diagonal of H) and the grids are made beforehand, so that a
column keeps its natural group and kernels need no permutation. Pure tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    act_order: bool = False,
    damping: float = 0.01,
    mask: Tensor | None = None,
) -> Grouped:
    """Quantize weight [N, K] (float32) for inputs with the given statistic.

    Args:
        group: columns per grid; the last group may be short.
        damping: λ as a share of H's mean diagonal; raised until H factors.
        mask: bool [N, K]; where False the weight becomes zero and its loss is repaired like any
            rounding error (the joint case of SparseGPT, arXiv:2301.00774). Its code means nothing.

    Raises:
        ValueError: the statistic is not finite.
    """
    factor, order = _factor(statistic, act_order, damping)
    groups = (order // group).tolist()
    # Transposed, so that a column of the layer is contiguous.
    work = weight.t()[order].contiguous()
    keep = None if mask is None else mask.t()[order].contiguous()
    first = weight if mask is None else weight * mask
    scales, zeros = rtn.grid(*rtn.group_range(first, group), bits, symmetric)
    scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    codes = torch.empty_like(work, dtype=torch.uint8)
    for start, end in _blocks(len(groups), group):
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            g = groups[j]
            if j % group == 0 and not act_order:
                fresh = work[j : j + group]
                if keep is not None:
                    fresh = fresh * keep[j : j + group]
                scales[g], zeros[g] = rtn.grid(*fresh.aminmax(dim=0), bits, symmetric)
            codes[j] = rtn.encode(work[j], scales[g], zeros[g], bits)
            rounded = scales[g] * (codes[j] - zeros[g])
            if keep is not None:
                rounded = rounded * keep[j]
            error = (work[j] - rounded) / factor[j, j]
            work[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1.0)
            errors[j - start] = error
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1.0)
    codes = codes[torch.argsort(order)]
    codes, scales, zeros = (t.t().contiguous() for t in (codes, scales, zeros))
    return Grouped(codes, scales, zeros, bits, group)


def _factor(statistic: Gram, act_order: bool, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of H⁻¹ and the column order it is for."""
    order = torch.arange(statistic.matrix.shape[0], device=statistic.matrix.device)
    if act_order:
        order = torch.argsort(statistic.matrix.diagonal(), descending=True, stable=True)
        statistic = Gram(statistic.matrix[order][:, order], statistic.tokens)
    while True:
        inverse = torch.cholesky_inverse(grams.cholesky(statistic, damping))
        factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(info):
            return factor, order
        damping *= 10  # float32 lost definiteness in the inverse


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Column ranges of about `_BLOCK`, such that every group lies in one or starts one."""
    size = group * (_BLOCK // group) if group <= _BLOCK else _BLOCK
    for outer in range(0, columns, max(size, group)):
        stop = min(outer + max(size, group), columns)
        for start in range(outer, stop, size):
            yield start, min(start + size, stop)
