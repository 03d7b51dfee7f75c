"""Half of the weights kept, in any pattern with equally many per row: values and a bitmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import LinearForm


@dataclass(frozen=True, eq=False)
class Bitmap(LinearForm):
    """The kept weights of every row, and one bit per weight that says where they are.

    Rows keep equally many, so that the values are a matrix, which quantizes like any other. Half
    kept in 16 bits takes 9/16 of the dense bytes.

    Attributes:
        values: form of shape [N, kept] (`Dense`, or `Grouped` in a stack), in column order.
        mask: bool [N, K], `kept` True in every row.
    """

    values: LinearForm
    mask: Tensor
    scheme: ClassVar[str] = "sparse"

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        out = torch.zeros(self.shape, dtype=dtype, device=self.mask.device)
        return out.masked_scatter_(self.mask, self.values.dense(dtype))

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        return self.values.nbytes + rows * -(-columns // 8)

    def stored_as(self, dtype: torch.dtype) -> Bitmap:
        return Bitmap(self.values.stored_as(dtype), self.mask.cpu())
