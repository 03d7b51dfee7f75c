"""Eight-bit floating point: E4M3 weights with one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import LinearForm


@dataclass(frozen=True, eq=False)
class Float8(LinearForm):
    """`W[n] = scales[n] * codes[n]`.

    Attributes:
        codes: float8_e4m3fn [N, K] (one sign, four exponent, three mantissa bits; largest 448).
        scales: float32 [N].
    """

    codes: Tensor
    scales: Tensor
    scheme: ClassVar[str] = "float8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(exact) * self.scales.unsqueeze(1)).to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Float8:
        return Float8(self.codes.cpu(), self.scales.cpu())
