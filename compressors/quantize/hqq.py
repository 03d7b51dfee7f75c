"""Half-Quadratic Quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): data-free.

Fits the zero point of each group under a sparse error norm, min_z ‖W − s(Q − z)‖ₚᵖ with p < 1,
which lets few outliers go and keeps the many small weights exact. With an auxiliary error variable
E the two sub-problems have closed forms (blog eqs. 4 and 6):

    E ← shrinkₚ(W − Ŵ, β),  shrinkₚ(x, β) = sign(x) · relu(|x| − |x|ᵖ⁻¹/β)
    z ← mean of Q − (W − E)/s over the group,  β ← κβ

Every group keeps the zero point of least squared error it met, the rounded one of round-to-nearest
included. Pure tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressors.quantize import rtn
from compressors.tensor import Grouped

_P, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20
_AT_ONCE = 2**22  # weights worked on at once: bounds the memory of temporaries


def solve(
    weight: Tensor, statistic: None = None, *, bits: int, group: int, symmetric: bool = False
) -> Grouped:
    """Quantize weight [N, K] (float32); `zeros` come out fractional unless `symmetric`."""
    start = rtn.solve(weight, bits=bits, group=group, symmetric=symmetric)
    if symmetric:
        return start
    rows = max(1, _AT_ONCE // weight.shape[1])
    zeros = start.zeros.clone()
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        zeros[part] = _fit_zeros(weight[part], start.scales[part], zeros[part], bits, group)
    index = start.group_index()
    codes = rtn.encode(weight, start.scales[:, index], zeros[:, index], bits)
    return Grouped(codes, start.scales, zeros, bits, group)


def _fit_zeros(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    columns = weight.shape[1]
    groups = rtn.by_group(weight, group)
    count = math.ceil(columns / group)
    valid = (torch.arange(count * group, device=weight.device) < columns).view(count, group)
    sizes = valid.sum(-1)
    s, z = scales.unsqueeze(-1), zeros
    best, least = zeros, torch.full_like(zeros, math.inf)
    beta = _BETA
    for _ in range(_ITERATIONS):
        # float16 numbers, so that kernels may store zeros in 16 bits without loss
        z = z.to(torch.float16).float()
        codes = torch.round(groups / s + z.unsqueeze(-1)).clamp_(0, 2**bits - 1)
        error = groups - s * (codes - z.unsqueeze(-1))
        loss = (error.square() * valid).sum(-1)
        best = torch.where(loss < least, z, best)
        least = torch.minimum(loss, least)
        magnitude = error.abs()
        shrunk = error.sign() * torch.relu(magnitude - magnitude.pow(_P - 1) / beta)
        target = codes - (groups - shrunk) / s
        z = (target * valid).sum(-1) / sizes
        beta *= _KAPPA
    return best
