"""2:4 sparsity: the pattern, and magnitude pruning (Han et al. 2015, arXiv:1506.02626).

Of every four neighbouring weights of a row the two of highest score stay (Mishra et al. 2021,
arXiv:2104.08378); here the score is |w|. Pure tensors; needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.tensor import Dense, Sparse24


def solve(weight: Tensor, statistic: None = None) -> Sparse24:
    """Prune weight [N, K] (float32, K a multiple of 4) by magnitude."""
    return compact(weight, keep_best(weight.abs()))


def keep_best(score: Tensor) -> Tensor:
    """Position (uint8 [N, K/2], ascending) of the two best of every four; the first wins a tie.

    Raises:
        ValueError: K is not a multiple of 4.
    """
    rows, columns = score.shape
    if columns % 4:
        raise ValueError(f"2:4 sparsity needs a multiple of four columns, not {columns}")
    fours = score.view(rows, columns // 4, 4)
    best = torch.argsort(fours, dim=-1, descending=True, stable=True)[..., :2]
    return best.sort(dim=-1).values.to(torch.uint8).view(rows, columns // 2)


def compact(weight: Tensor, index: Tensor) -> Sparse24:
    """The weights [N, K] that `index` names, as a form."""
    return Sparse24(Dense(weight.gather(1, columns_of(index))), index)


def columns_of(index: Tensor) -> Tensor:
    """Column (int64 [N, K/2]) of every kept value."""
    base = torch.arange(index.shape[1], device=index.device) // 2 * 4
    return base + index.long()


def mask_of(index: Tensor) -> Tensor:
    """bool [N, K], True where the weight stays."""
    mask = torch.zeros(index.shape[0], index.shape[1] * 2, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, columns_of(index), True)
