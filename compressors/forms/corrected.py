"""A compressed weight and a low-rank correction of what it lost: `W ≈ base + left @ right`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import LinearForm, LowRank


@dataclass(frozen=True, eq=False)
class Corrected(LinearForm):
    """`y = base(x) + left(right(x))`.

    Attributes:
        base: the compressed layer, any form of shape [N, K].
        correction: factors [N, r] and [r, K].
    """

    base: LinearForm
    correction: LowRank
    scheme: ClassVar[str] = "corrected"

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.correction.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.base.dense(exact) + self.correction.dense(exact)).to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Corrected:
        return Corrected(self.base.stored_as(dtype), self.correction.stored_as(dtype))
