"""One weight at two precisions: the 4-bit codes of a child and what refines them to a parent.

The child is a whole 4-bit layer of its own (`Grouped`). The parent adds a second 4-bit code per
weight, in steps of an eighth of the child's:

    W_parent[n,k] = scale/8 · (8·(code − zero) + low − 8)

Steps of a sixteenth would split the child's step evenly, but its codes were chosen to repair each
other's errors, not to be nearest: what is left often exceeds half a step, and eighths reach a whole
one. 8·code + low is the parent's code on one uniform grid (0..135), so one integer product serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import Grouped, LinearForm

RATIO = 8  # the child's step ÷ the parent's
CHILD_BITS = 4


@dataclass(frozen=True, eq=False)
class Nested(LinearForm):
    """A 4-bit layer and its refinement; stands for the parent's weight.

    Attributes:
        child: 4-bit codes, scales and zeros.
        low: uint8 [N, K], values 0..15; the refinement is `low − 8`.
    """

    child: Grouped
    low: Tensor
    scheme: ClassVar[str] = "nested"

    @property
    def shape(self) -> tuple[int, int]:
        return self.child.shape

    @property
    def refinement(self) -> Grouped:
        """`parent − child` as a symmetric 4-bit form."""
        zeros = torch.full_like(self.child.zeros, 2.0 ** (CHILD_BITS - 1))
        scales = self.child.scales / RATIO
        return Grouped(self.low, scales, zeros, CHILD_BITS, self.child.group, self.child.perm)

    @property
    def nbytes(self) -> int:
        return self.child.nbytes + -(-self.low.numel() * CHILD_BITS // 8)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.child.dense(exact) + self.refinement.dense(exact)).to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Nested:
        return Nested(self.child.stored_as(dtype), self.low.cpu())
