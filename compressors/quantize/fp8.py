"""FP8 (Micikevicius et al. 2022, arXiv:2209.05433): weights in E4M3, one scale per output channel.

    s_n = max|W_n| / 448,   C_n = e4m3(W_n / s_n)

448 is the largest E4M3 number (table 1). On a CUDA device with FP8 units inputs are rounded to E4M3
as well, with one scale per token, and the product is taken in FP8; elsewhere weights are widened
piece by piece. Pure tensors; needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.float8 import Float8

LARGEST = 448.0


def solve(
    weight: Tensor,
    statistic: None = None,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
) -> Float8:
    """Quantize weight [N, K] (float32). The other settings are what the level's name says."""
    top = weight.abs().amax(1)
    scales = torch.where(top > 0, top / LARGEST, torch.ones_like(top))
    # Beyond the largest number the cast gives NaN, and a quotient may be rounded up.
    ratio = (weight / scales.unsqueeze(1)).clamp_(-LARGEST, LARGEST)
    return Float8(ratio.to(torch.float8_e4m3fn), scales)
