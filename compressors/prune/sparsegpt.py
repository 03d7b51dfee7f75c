"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): prune column by column, repair the rest.

With H = XXᵀ + λI of the layer's inputs and U the upper Cholesky factor of H⁻¹ (so that U_jj² is the
diagonal entry of the inverse Hessian of the columns from j on), algorithm 1 for each column j:

    at a mask block's first column: keep the half of its columns with the largest w² / U_jj²
    e = (w_j − kept w_j) / U_jj,     W_:,j+1: ← W_:,j+1: − e · U_j,j+1:

Masks are chosen when the sweep arrives, on weights that already make good what came before. A mask
block is a group of the pattern, or 128 columns (B_s of section 3.2) at 50 %; the half is taken per
row and not over all rows of the block, as rows of equally many values are what is stored. Pure
tensors; the statistic is GPTQ's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors import gram as grams
from compressors.forms.sparse import Bitmap
from compressors.gram import Gram, accumulate, empty
from compressors.prune.magnitude import GROUPS, compact, keep_best
from compressors.tensor import Sparse24

__all__ = ["accumulate", "empty", "solve"]

_BLOCK = 128  # columns between lazy updates of the rest; a multiple of every group


def solve(
    weight: Tensor, statistic: Gram, *, pattern: str, damping: float = 0.01
) -> Sparse24 | Bitmap:
    """Prune weight [N, K] (float32; K a multiple of 4 for 2:4) for inputs with that statistic.

    Args:
        damping: λ as a share of H's mean diagonal; raised until H factors.

    Raises:
        ValueError: the statistic is not finite, or K is no multiple of 4 where it must be.
    """
    factor = grams.inverse_factor(statistic, damping)
    span = GROUPS[pattern] or _BLOCK
    # Transposed, so that a column of the layer is contiguous.
    work = weight.t().contiguous()
    keep = torch.empty_like(work, dtype=torch.bool)
    for start in range(0, len(work), _BLOCK):
        end = min(start + _BLOCK, len(work))
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            if j % span == 0:
                group = slice(j, min(j + span, end))
                score = work[group] / factor.diagonal()[group, None]
                keep[group] = keep_best(score.abs().t(), None).t()
            error = work[j] * ~keep[j] / factor[j, j]
            work[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1.0)
            errors[j - start] = error
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1.0)
    return compact(work.t().contiguous(), keep.t().contiguous(), pattern)
