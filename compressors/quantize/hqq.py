"""Half-Quadratic Quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): data-free.

Fits the zero point of each group under a sparse error norm, min_z ‖W − s(Q − z)‖ₚᵖ with p < 1,
which lets few outliers go and keeps the many small weights exact. With an auxiliary error variable
E the two sub-problems have closed forms (blog eqs. 4 and 6):

    E ← shrinkₚ(W − Ŵ, β),  shrinkₚ(x, β) = sign(x) · relu(|x| − |x|ᵖ⁻¹/β)
    z ← mean of Q − (W − E)/s over the group,  β ← κβ

This is done for a few narrowed ranges, as HQQ's later releases fit the scale too, and every group
keeps the scale and zero point of least squared error it met; those of round-to-nearest are among
them. Pure tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressors.quantize import rtn
from compressors.tensor import Grouped

_P, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 4
_AT_ONCE = 2**22  # weights worked on at once: bounds the memory of temporaries


def solve(
    weight: Tensor, statistic: None = None, *, bits: int, group: int, symmetric: bool = False
) -> Grouped:
    """Quantize weight [N, K] (float32); `zeros` come out fractional unless `symmetric`."""
    start = rtn.solve(weight, bits=bits, group=group, symmetric=symmetric)
    if symmetric:
        return start
    scales, zeros = start.scales.clone(), start.zeros.clone()
    rows = max(1, _AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        scales[part], zeros[part] = _fit(weight[part], scales[part], zeros[part], bits, group)
    index = start.group_index()
    codes = rtn.encode(weight, scales[:, index], zeros[:, index], bits)
    return Grouped(codes, scales, zeros, bits, group)


def _fit(
    weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [n, G] of least squared error met on the way."""
    columns = weight.shape[1]
    groups = rtn.by_group(weight, group)
    count = math.ceil(columns / group)
    valid = (torch.arange(count * group, device=weight.device) < columns).view(count, group)
    best_s, best_z, least = scales, zeros, torch.full_like(zeros, math.inf)
    for share in rtn.SHARES if bits < 8 else rtn.SHARES[:1]:
        s, z, beta = rtn.round_scale(scales * share).unsqueeze(-1), zeros, _BETA
        for _ in range(_ITERATIONS):
            # float16 numbers, so that kernels may store zeros in 16 bits without loss
            z = z.to(torch.float16).float()
            codes = torch.round(groups / s + z.unsqueeze(-1)).clamp_(0, 2**bits - 1)
            error = groups - s * (codes - z.unsqueeze(-1))
            loss = (error.square() * valid).sum(-1)
            better = loss < least
            best_s = torch.where(better, s.squeeze(-1), best_s)
            best_z = torch.where(better, z, best_z)
            least = torch.minimum(loss, least)
            magnitude = error.abs()
            shrunk = error.sign() * torch.relu(magnitude - magnitude.pow(_P - 1) / beta)
            target = codes - (groups - shrunk) / s
            z = (target * valid).sum(-1) / valid.sum(-1)
            beta *= _KAPPA
    return best_s, best_z
