"""SVD-LLM (Wang et al. 2024, arXiv:2403.07378): truncation-aware low rank by whitening.

With S the lower Cholesky factor of XXᵀ (eq. 3, section 3.1), the singular values of M = WS = UΣVᵀ
are exactly the losses of truncating them: ‖(W − W′)X‖_F² = Σ_{i>r} σ_i². So (theorem 3.2)

    W′ = U_r Σ_r V_rᵀ S⁻¹ = U_r (U_rᵀ W):     left = U_r,     right = U_rᵀ W

is the best rank-r weight for these inputs. U comes from the symmetric eigenproblem on M's shorter
side, MMᵀ = W(XXᵀ)Wᵀ or MᵀM, which is many times faster than the SVD; in float64 squaring the
spectrum costs nothing that matters. Orthonormal left factors also quantize well. Pure tensors.
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
    if not bool(torch.isfinite(statistic.matrix).all()):
        raise ValueError("the calibration inputs are not finite")
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        vectors = torch.linalg.eigh(w @ statistic.matrix.double() @ w.t()).eigenvectors
        left = vectors.flip(1)[:, :rank]
    else:
        whitened = w @ grams.cholesky(statistic, _DAMPING, torch.float64)
        vectors = torch.linalg.eigh(whitened.t() @ whitened).eigenvectors
        # M v = σ u; a vanishing σ gives no direction, nor is one needed: QR fills in.
        left = torch.linalg.qr(whitened @ vectors.flip(1)[:, :rank]).Q
    return LowRank(Dense(left.float().contiguous()), Dense((left.t() @ w).float()))
