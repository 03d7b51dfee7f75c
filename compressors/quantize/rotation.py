"""Incoherence by rotation, then GPTQ: for three bits and fewer.

A random Hadamard rotation R of the inputs makes the columns of W Rᵀ and the energies of R x alike
(QuIP#, Tseng et al. 2024, arXiv:2402.04396, section 3 and lemma 3.1; on the input side only, where
QuaRot, arXiv:2404.00456, section 4, has its online rotations), so that no column's outliers widen
the grid of the rest. GPTQ (arXiv:2210.17323) then works in the rotated basis, with R H Rᵀ for H:

    Ŵ = GPTQ(W Rᵀ; R H Rᵀ) R,    R = blocks of Hadamard · diag(random signs)

K need not be a power of two: blocks are the largest power of two that divides it, up to a size
whose product is cheap beside the layer's. Pure tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.rotated import Rotated, mixed
from compressors.gram import Gram, accumulate, empty
from compressors.quantize import gptq
from compressors.tensor import LinearForm

__all__ = ["accumulate", "empty", "solve"]

MAX_BLOCK = 128
_SEED = 2402  # equal layers get equal signs, in every run


def solve(
    weight: Tensor, statistic: Gram, *, bits: int, group: int, symmetric: bool = False
) -> LinearForm:
    """Quantize weight [N, K] (float32) for inputs with the given statistic; the last group may be
    short. An odd K has nothing to rotate by: that layer is GPTQ's.

    Raises:
        ValueError: the statistic is not finite.
    """
    columns = weight.shape[1]
    block = min(columns & -columns, MAX_BLOCK)
    if block == 1:
        return gptq.solve(weight, statistic, bits=bits, group=group, symmetric=symmetric)
    generator = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(0, 2, (columns,), generator=generator, dtype=torch.int8) * 2 - 1
    signs = signs.to(weight.device)
    half = mixed(statistic.matrix * signs, block).t() * signs
    turned = Gram(mixed(half, block), statistic.tokens)
    form = gptq.solve(
        mixed(weight * signs, block), turned, bits=bits, group=group, symmetric=symmetric
    )
    return Rotated(form, signs, block)
