"""Embedding and output head in 8 or 4 bits: half or a third of what dominates a small model.

Round to nearest (arXiv:1712.05877, eqs. 1–3) in groups along a token's row. At 8 bits one symmetric
group per row; at 4 bits groups of 32 with a zero point, each range narrowed to its least squared
error (arXiv:1902.06822, section 3). Pure tensors; needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.table import Table
from compressors.quantize import rtn
from compressors.tensor import Grouped

_GROUP_OF_4 = 32
_WEIGHTS_AT_ONCE = 1 << 22


def solve(weight: Tensor, *, bits: int) -> Table:
    """Quantize the rows of weight [V, H] (any float dtype) to 8 or 4 bits.

    Raises:
        ValueError: the weight is not finite.
    """
    width = weight.shape[1]
    group = width if bits == 8 else min(_GROUP_OF_4, width)
    index = torch.arange(width, device=weight.device) // group
    codes, scales, zeros = [], [], []
    step = max(1, _WEIGHTS_AT_ONCE // width)
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step].float()
        if not bool(torch.isfinite(part).all()):
            raise ValueError("the weight is not finite")
        s, z = rtn.fitted_grid(part, bits, group, symmetric=bits == 8)
        codes.append(rtn.encode(part, s[:, index], z[:, index], bits))
        scales.append(s)
        zeros.append(z)
    return Table(Grouped(torch.cat(codes), torch.cat(scales), torch.cat(zeros), bits, group))
