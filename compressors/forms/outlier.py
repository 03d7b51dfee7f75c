"""A few columns in 16 bits beside all others in fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import Dense, LinearForm


@dataclass(frozen=True, eq=False)
class Outlier(LinearForm):
    """`y = rest(x) + values @ x[columns]`.

    Attributes:
        rest: [N, K], zero in `columns`.
        values: [N, O], the weights of `columns`.
        columns: int32 [O], ascending, at least one.
    """

    rest: LinearForm
    values: Dense
    columns: Tensor
    scheme: ClassVar[str] = "outlier"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rest.shape

    @property
    def nbytes(self) -> int:
        return self.rest.nbytes + self.values.nbytes + 4 * self.columns.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        out = self.rest.dense(dtype)
        out[:, self.columns.long()] = self.values.dense(dtype)
        return out

    def stored_as(self, dtype: torch.dtype) -> Outlier:
        return Outlier(self.rest.stored_as(dtype), self.values.stored_as(dtype), self.columns.cpu())
