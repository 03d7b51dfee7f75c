"""The patterns of half sparsity, and magnitude pruning (Han et al. 2015, arXiv:1506.02626).

Of every group of a row's weights the better half stays; here the score is |w|. A group is four
neighbours (2:4, Mishra et al. 2021, arXiv:2104.08378), eight (4:8), or the whole row (50 %,
unstructured): never several rows, as Wanda found best (arXiv:2306.11695, section 3) and as rows of
equally many values are what is stored. Pure tensors; needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.sparse import Bitmap
from compressors.tensor import Dense, Sparse24

# Columns that compete for a pattern's places; None: all of a row's.
GROUPS: dict[str, int | None] = {"24": 4, "48": 8, "50": None}


def solve(weight: Tensor, statistic: None = None, *, pattern: str) -> Sparse24 | Bitmap:
    """Prune weight [N, K] (float32; K a multiple of 4 for 2:4) by magnitude."""
    return compact(weight, keep_best(weight.abs(), GROUPS[pattern]), pattern)


def keep_best(score: Tensor, group: int | None) -> Tensor:
    """bool [N, K]: the better half of each group of columns; the first wins a tie.

    A group of odd size, which only the last can be, keeps the larger half.
    """
    rows, columns = score.shape
    group = min(group or columns, columns)
    whole = columns // group * group
    mask = _better_half(score[:, :whole].reshape(rows, -1, group)).view(rows, whole)
    if whole == columns:
        return mask
    return torch.cat([mask, _better_half(score[:, whole:])], dim=1)


def _better_half(score: Tensor) -> Tensor:
    """Along the last dimension."""
    best = torch.argsort(score, dim=-1, descending=True, stable=True)
    best = best[..., : (score.shape[-1] + 1) // 2]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)


def compact(weight: Tensor, mask: Tensor, pattern: str) -> Sparse24 | Bitmap:
    """The weights [N, K] that `mask` keeps, as the form of `pattern`.

    Raises:
        ValueError: 2:4 of a number of columns that is no multiple of four.
    """
    rows, columns = weight.shape
    values = Dense(weight[mask].view(rows, -1))
    if pattern != "24":
        return Bitmap(values, mask)
    if columns % 4:
        raise ValueError(f"2:4 sparsity needs a multiple of four columns, not {columns}")
    fours = mask.view(rows, columns // 4, 4).to(torch.uint8)
    index = torch.argsort(fours, dim=-1, descending=True, stable=True)[..., :2]
    return Sparse24(values, index.to(torch.uint8).reshape(rows, columns // 2))


def mask_of(form: Sparse24 | Bitmap) -> Tensor:
    """bool [N, K], True where the weight stays."""
    if isinstance(form, Bitmap):
        return form.mask
    index = form.index
    columns = torch.arange(index.shape[1], device=index.device) // 2 * 4 + index.long()
    mask = torch.zeros(form.shape, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, columns, True)
