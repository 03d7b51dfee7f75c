"""A form behind a rotation: the layer's inputs are mixed before they meet the weight.

A random Hadamard rotation (QuIP#, Tseng et al. 2024, arXiv:2402.04396, section 3; QuaRot, Ashkboos
et al. 2024, arXiv:2404.00456) spreads a weight's and its inputs' outliers over many columns, so
that few bits represent them better. It is orthogonal: `W x = (W Rᵀ)(R x)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import LinearForm


@dataclass(frozen=True, eq=False)
class Rotated(LinearForm):
    """`y = form(R x)` with `R = H diag(signs)`, H block-diagonal of Hadamard matrices.

    Attributes:
        form: of shape [N, K].
        signs: int8 [K], each 1 or -1.
        block: columns of one Hadamard matrix: a power of two that divides K.
    """

    form: LinearForm
    signs: Tensor
    block: int
    scheme: ClassVar[str] = "rotated"

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.shape

    @property
    def nbytes(self) -> int:
        return self.form.nbytes + self.signs.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (mixed(self.form.dense(exact), self.block) * self.signs).to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Rotated:
        return Rotated(self.form.stored_as(dtype), self.signs.cpu(), self.block)


def mixed(rows: Tensor, block: int) -> Tensor:
    """rows [..., K] times the block-diagonal H, which is symmetric and its own inverse."""
    pieces = rows.reshape(-1, block)
    return (pieces @ hadamard(block, rows.device).to(rows.dtype)).view(rows.shape)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix, orthonormal, float32 [size, size]; shared by all layers."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix /= size**0.5
    return matrix
