"""Wanda (Sun et al. 2023, arXiv:2306.11695): prune by weight times input norm, no weight update.

Score of weight w_ij (eq. 1): S_ij = |w_ij| · ‖X_j‖₂, compared per output row (section 3), or
inside each row's groups of four or eight (structured N:M). Pure tensors; the statistic is one
number per input column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressors.forms.sparse import Bitmap
from compressors.prune.magnitude import GROUPS, compact, keep_best
from compressors.tensor import Sparse24


@dataclass
class Energy:
    """Sum of squares of every input column, `squares` float32 [K], over `tokens` tokens."""

    squares: Tensor
    tokens: int = 0


def empty(in_features: int, device: torch.device | str = "cpu") -> Energy:
    """A statistic that has seen nothing."""
    return Energy(torch.zeros(in_features, device=device))


def accumulate(energy: Energy, x: Tensor) -> None:
    """Add the rows of x [..., K], any float dtype, in place."""
    rows = x.reshape(-1, x.shape[-1]).float()
    energy.squares.add_(rows.square().sum(0))
    energy.tokens += rows.shape[0]


def solve(weight: Tensor, statistic: Energy, *, pattern: str) -> Sparse24 | Bitmap:
    """Prune weight [N, K] (float32; K a multiple of 4 for 2:4) for inputs with the given statistic.

    Raises:
        ValueError: the statistic is not finite, or K is no multiple of 4 where it must be.
    """
    if not bool(torch.isfinite(statistic.squares).all()):
        raise ValueError("the calibration inputs are not finite")
    score = weight.abs() * statistic.squares.sqrt()
    return compact(weight, keep_best(score, GROUPS[pattern]), pattern)
