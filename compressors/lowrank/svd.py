"""SVD-LLM (Wang et al. 2024, arXiv:2403.07378): truncation-aware low rank by whitening.

With S the lower Cholesky factor of XXᵀ (eq. 3 and section 3.1), the singular values of WS are
exactly the losses of truncating them: ‖(W − W′)X‖_F² = Σ_{i>r} σ_i². So, from WS = UΣVᵀ,

    left = U_r Σ_r^½,     right = Σ_r^½ V_rᵀ S⁻¹

is the best rank-r weight for these inputs (theorem 3.2). Pure tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors import gram as grams
from compressors.gram import Gram, accumulate, empty
from compressors.tensor import Dense, LowRank

__all__ = ["accumulate", "empty", "rank_of", "solve"]

_DAMPING = 1e-6


def rank_of(out_features: int, in_features: int, percent: int) -> int:
    """The largest rank whose two factors hold at most `percent` of the layer's parameters.

    Zero when no rank does: such a layer is better left dense.
    """
    return out_features * in_features * percent // (100 * (out_features + in_features))


def solve(weight: Tensor, statistic: Gram, *, rank: int) -> LowRank:
    """Best rank-`rank` factors of weight [N, K] (float32) for inputs with the given statistic.

    Raises:
        ValueError: the statistic is not finite.
    """
    whitener = grams.cholesky(statistic, _DAMPING, torch.float64)
    u, s, vt = torch.linalg.svd(weight.double() @ whitener, full_matrices=False)
    root = s[:rank].sqrt()
    left = u[:, :rank] * root
    right = torch.linalg.solve_triangular(
        whitener, root.unsqueeze(1) * vt[:rank], upper=False, left=False
    )
    return LowRank(Dense(left.float()), Dense(right.float().contiguous()))
