"""A table of rows in integer codes: an embedding, an output head, or both at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import Grouped, LinearForm


@dataclass(frozen=True, eq=False)
class Table(LinearForm):
    """One row per token. A model whose head is tied to its embedding has one for both.

    Attributes:
        rows: [V, H], without activation order.
    """

    rows: Grouped
    scheme: ClassVar[str] = "table"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows.dense(dtype)

    def stored_as(self, dtype: torch.dtype) -> Table:
        return Table(self.rows.stored_as(dtype))
