"""W8A8: int8 weights per channel, int8 activations per token, both symmetric, products in integers.

Round to nearest with one step per output channel (weights) and per token (activations, measured as
they come): the "per-channel" and "per-token dynamic" scheme of ZeroQuant (Yao et al. 2022,
arXiv:2206.01861, section 3) and the baseline of SmoothQuant (arXiv:2211.10438, eqs. 1 and 2):

    Δ = max|x| / 127,   q = round(x / Δ),   Y = diag(Δ_X) (Q_X Q_Wᵀ) diag(Δ_W)

Pure tensors; needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.int8 import Int8

LEVELS = 127


def solve(
    weight: Tensor,
    statistic: None = None,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
) -> Int8:
    """Quantize weight [N, K] (float32). The other settings are what the level's name says."""
    return Int8(*round_rows(weight))


def round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and steps float32 [M] of values [M, K]: eqs. 1 and 2 along each row."""
    low, high = values.float().aminmax(dim=1)
    top = torch.maximum(-low, high)
    steps = torch.where(top > 0, top / LEVELS, torch.ones_like(top))
    return values.div(steps.unsqueeze(1)).round_().to(torch.int8), steps


def product(x: Tensor, form: Int8) -> Tensor:
    """What a layer of that form gives for inputs x [M, K], in float32: the level's arithmetic."""
    codes, steps = round_rows(x if form.inputs is None else x * form.inputs)
    out = codes.float() @ form.codes.float().t()
    return out * steps.unsqueeze(1) * form.scales
