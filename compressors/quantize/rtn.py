"""Round to nearest: the uniform grid every quantizer here shares, and the plainest use of it.

Per group of weights w with bits b, asymmetric (Jacob et al. 2017, arXiv:1712.05877, eqs. 1–3):

    s = (max(w, 0) − min(w, 0)) / (2ᵇ − 1),   z = round(−min(w, 0) / s),   q = clip(round(w/s) + z)

Symmetric: s = max|w| / (2ᵇ⁻¹ − 1), z = 2ᵇ⁻¹. Pure tensors; needs no calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compressors.tensor import Grouped

# Parts of a group's range that a fitted grid may span.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
_TINY = 2.0**-24  # the smallest positive float16
_AT_ONCE = 2**17  # weights


def solve(
    weight: Tensor, statistic: None = None, *, bits: int, group: int, symmetric: bool = False
) -> Grouped:
    """Quantize weight [N, K] (float32) in groups of `group` columns; the last may be short."""
    shape = (weight.shape[0], math.ceil(weight.shape[1] / group))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty(shape, device=weight.device) for _ in range(2))
    for rows in row_pieces(weight):
        lo, hi = group_range(weight[rows], group)
        scales[rows], zeros[rows] = grid(lo, hi, bits, symmetric)
        codes[rows] = encode_groups(weight[rows], scales[rows], zeros[rows], bits, group)
    return Grouped(codes, scales, zeros, bits, group)


def row_pieces(weight: Tensor, at_once: int = _AT_ONCE) -> Iterator[slice]:
    """Rows of weight [N, K] in pieces that stay in a core's caches; all at once on a GPU."""
    step = max(1, at_once // weight.shape[1]) if weight.is_cpu else weight.shape[0]
    for first in range(0, weight.shape[0], step):
        yield slice(first, first + step)


def group_range(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every group, each [N, G]."""
    groups = by_group(weight, group)
    return groups.amin(-1), groups.amax(-1)


def by_group(weight: Tensor, group: int) -> Tensor:
    """[N, K] → [N, G, group]; a short last group is filled up by repeating its last column."""
    columns = weight.shape[1]
    count = math.ceil(columns / group)
    if count * group != columns:
        index = torch.arange(count * group, device=weight.device).clamp_(max=columns - 1)
        weight = weight[:, index]
    return weight.reshape(weight.shape[0], count, group)


def grid(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros (float32, shape of lo) of the grids that span [lo, hi] and contain 0.

    Scales are rounded to float16 numbers, so that kernels may store them in 16 bits without loss.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        scales = round_scale(torch.maximum(-lo, hi) / (2 ** (bits - 1) - 1))
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    scales = round_scale((hi - lo) / (2**bits - 1))
    zeros = torch.round(-lo / scales).clamp_(0, 2**bits - 1)
    return scales, zeros


def fitted_grid(
    weight: Tensor, bits: int, group: int, symmetric: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G] of least squared error per group among a few narrowed ranges.

    Giving up the outermost weights makes the step finer for all others (OMSE, Choukroun et al.
    2019, arXiv:1902.06822, section 3). The full range is among the candidates.

    Args:
        importance: what a squared error counts, float32 [N or 1, K]; None is 1 everywhere.
    """
    lo, hi = group_range(weight, group)
    groups = by_group(weight, group)
    padding = groups.shape[1] * group - weight.shape[1]
    counts = None if importance is None else by_group(importance, group)
    scales, zeros = grid(lo, hi, bits, symmetric)
    least = torch.full_like(scales, math.inf)
    for share in SHARES if bits < 8 else SHARES[:1]:
        s, z = grid(lo * share, hi * share, bits, symmetric)
        codes = torch.round(groups / s.unsqueeze(-1) + z.unsqueeze(-1)).clamp_(0, 2**bits - 1)
        wrong = codes.sub_(z.unsqueeze(-1)).mul_(s.unsqueeze(-1)).sub_(groups)
        if padding:
            wrong[:, -1, group - padding :] = 0.0
        wrong.square_()
        error = (wrong if counts is None else wrong.mul_(counts)).sum(-1)
        better = error < least
        scales, zeros = torch.where(better, s, scales), torch.where(better, z, zeros)
        least = torch.minimum(error, least)
    return scales, zeros


def round_scale(scales: Tensor) -> Tensor:
    """Nearest positive float16 number, as float32; 1 for a group of zeros."""
    rounded = scales.to(torch.float16).float().clamp_(_TINY, 65504.0)
    return torch.where(scales > 0, rounded, torch.ones_like(rounded))


def encode_groups(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    """Nearest codes, uint8 [N, K], of weight [N, K] on the grids [N, G] of its groups."""
    n, columns = weight.shape
    if columns % group:
        index = torch.arange(columns, device=weight.device) // group
        return encode(weight, scales[:, index], zeros[:, index], bits)
    groups = weight.reshape(n, -1, group)
    codes = (groups / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).round_()
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8).view(n, columns)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Nearest codes, uint8; scales and zeros broadcast against weight. Zeros may be fractional."""
    return torch.round(weight / scales + zeros).clamp_(0, 2**bits - 1).to(torch.uint8)
