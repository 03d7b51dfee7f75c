"""AWQ (Lin et al. 2023, arXiv:2306.00978): scale the columns that meet large inputs, then round.

A column scaled up by s before rounding and its input scaled down keeps the product and shrinks that
column's part of the error (eqs. 2 and 3). The scales are one power of the inputs' magnitude, the
power searched on calibration statistics (eqs. 4 and 5):

    s = s_Xᵅ,   α* = argmin over [0, 1] of ‖Q(W·diag(s)) diag(s)⁻¹ X − W X‖

Then, as the authors' code does, each group's range is clipped to what gives the least output error
of that group alone. s_X is the root mean square of each input column and both errors are
quadratic forms of XXᵀ, so the statistic is GPTQ's and no inputs are kept. Every linear has scales
of its own (form `Scaled`), where the authors fold shared ones into the layer before. Pure tensors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.forms.scaled import Scaled
from compressors.gram import Gram, accumulate, empty
from compressors.quantize import rtn
from compressors.tensor import Grouped, LinearForm

__all__ = ["accumulate", "empty", "solve"]

POWERS = tuple(i / 20 for i in range(20))
SHARES = tuple(1 - i / 20 for i in range(10))  # of a group's range that clipping leaves
_TINY = 1e-4
_ROWS = 256  # of a weight that the power is chosen on
_AT_ONCE = 2**22  # weights worked on at once: bounds the memory of temporaries


def solve(
    weight: Tensor, statistic: Gram, *, bits: int, group: int, symmetric: bool = False
) -> LinearForm:
    """Quantize weight [N, K] (float32) for inputs with the given statistic; the last group may be
    short. The form has no input scale where the best power is 0.

    Raises:
        ValueError: the statistic is not finite.
    """
    if not bool(torch.isfinite(statistic.matrix).all()):
        raise ValueError("the calibration inputs are not finite")
    magnitude = statistic.matrix.diagonal().clamp(min=0).sqrt()
    power = _best_power(weight, statistic.matrix, magnitude, (bits, group, symmetric))
    scale = scales_of(magnitude, power)
    matrix = statistic.matrix / torch.outer(scale, scale)
    scaled = weight * scale
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grids = []
    for rows in rtn.row_pieces(scaled, _AT_ONCE):
        grids.append(_clipped_grid(scaled[rows], matrix, bits, group, symmetric))
        codes[rows] = rtn.encode_groups(scaled[rows], *grids[-1], bits, group)
    scales, zeros = (torch.cat(part) for part in zip(*grids, strict=True))
    form = Grouped(codes, scales, zeros, bits, group)
    return form if power == 0 else Scaled(form, 1 / scale)


def scales_of(magnitude: Tensor, power: float) -> Tensor:
    """s [K] for inputs of that magnitude [K]; its largest and smallest are each other's inverse."""
    scale = magnitude.clamp(min=_TINY).pow(power)
    return scale / (scale.max() * scale.min()).sqrt()


def _best_power(
    weight: Tensor, matrix: Tensor, magnitude: Tensor, grid: tuple[int, int, bool]
) -> float:
    bits, group, symmetric = grid
    rows = weight[:: math.ceil(len(weight) / _ROWS)]
    best, least = 0.0, math.inf
    for power in POWERS:
        scale = scales_of(magnitude, power)
        form = rtn.solve(rows * scale, bits=bits, group=group, symmetric=symmetric)
        wrong = form.dense() / scale - rows
        loss = float(((wrong @ matrix) * wrong).sum())
        if loss < least:
            best, least = power, loss
    return best


def _clipped_grid(
    weight: Tensor, matrix: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G] of least e H eᵀ, e the error of a group and H its block of matrix."""
    lo, hi = rtn.group_range(weight, group)
    groups = rtn.by_group(weight, group).transpose(0, 1)  # [G, N, group]
    blocks = _diagonal_blocks(matrix, group)
    scales, zeros = rtn.grid(lo, hi, bits, symmetric)
    least = torch.full_like(scales, math.inf)
    for share in SHARES:
        grid = rtn.grid(lo * share, hi * share, bits, symmetric)
        s, z = (part.t().unsqueeze(-1) for part in grid)
        wrong = (groups / s).add_(z).round_().clamp_(0, 2**bits - 1).sub_(z).mul_(s).sub_(groups)
        error = torch.bmm(wrong, blocks).mul_(wrong).sum(-1).t()
        better = error < least
        scales = torch.where(better, grid[0], scales)
        zeros = torch.where(better, grid[1], zeros)
        least = torch.minimum(error, least)
    return scales, zeros


def _diagonal_blocks(matrix: Tensor, group: int) -> Tensor:
    """[G, group, group]: the matrix's blocks of every group, zero where the last has no columns."""
    columns = len(matrix)
    padded = F.pad(matrix, (0, -columns % group, 0, -columns % group))
    count = len(padded) // group
    blocks = padded.view(count, group, count, group)
    return torch.stack([blocks[i, :, i] for i in range(count)])
