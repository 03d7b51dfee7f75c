"""LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): outlier columns apart, the rest in int8.

    Y = Σ_{h∈O} X_h W_h  +  diag(Δ_X) (Q_X Q_Wᵀ) diag(Δ_W)        (eq. 8, vector-wise as in eq. 7)

O holds the input columns with a value of magnitude α = 6 or more (section 3.2, found for normalized
inputs; here in units of the layer's root mean square). The paper looks for O in every batch, which
lets a token's result depend on its neighbours; here O is chosen once, on calibration text, as the
features are few and always the same ones (section 4), and at most one column in 32. Pure tensors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressors.forms.int8 import Int8
from compressors.forms.outlier import Outlier
from compressors.quantize import w8a8
from compressors.quantize.inputs import Inputs, accumulate, empty
from compressors.tensor import Dense

__all__ = ["accumulate", "empty", "outliers", "solve"]

_ALPHA = 6.0
_SHARE = 32


def solve(
    weight: Tensor,
    statistic: Inputs,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
) -> Outlier | Int8:
    """Quantize weight [N, K] (float32) for inputs like those of the statistic; a plain W8A8 form
    where no column stands out.

    Raises:
        ValueError: the statistic is not finite.
    """
    if not bool(torch.isfinite(statistic.absmax).all()):
        raise ValueError("the calibration inputs are not finite")
    columns = outliers(statistic)
    if not columns.numel():
        return w8a8.solve(weight)
    used = torch.ones_like(statistic.absmax).index_fill_(0, columns, 0.0)
    rest = replace(w8a8.solve(weight * used), inputs=used)
    return Outlier(rest, Dense(weight[:, columns].contiguous()), columns.to(torch.int32))


def outliers(statistic: Inputs) -> Tensor:
    """O, int64, ascending."""
    most = -(-statistic.absmax.numel() // _SHARE)
    top = statistic.absmax.topk(most)
    return top.indices[top.values >= _ALPHA * max(statistic.rms, 1e-30)].sort().values
