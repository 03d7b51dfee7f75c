"""Eight bits on both sides: int8 weights for inputs that are quantized to int8 on the fly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import LinearForm


@dataclass(frozen=True, eq=False)
class Int8(LinearForm):
    """`y = scales * (codes @ q(x * inputs))`, `q` being round to nearest on 255 levels.

    The levels of `q` span each token's own largest value, so that a token's result depends on no
    other; it is rounding of activations, and `dense()` knows only of weights.

    Attributes:
        codes: int8 [N, K], -127 to 127.
        scales: float32 [N], one step per output channel.
        inputs: float32 [K] or None: what every input is multiplied with before it is rounded;
            1 / s for SmoothQuant's s, 0 for a column that is not computed here.
    """

    codes: Tensor
    scales: Tensor
    inputs: Tensor | None = None
    scheme: ClassVar[str] = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        columns = 0 if self.inputs is None else 4 * self.inputs.numel()
        return self.codes.numel() + 4 * self.scales.numel() + columns

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        weight = self.codes.to(exact) * self.scales.unsqueeze(1)
        return (weight if self.inputs is None else weight * self.inputs).to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Int8:
        inputs = None if self.inputs is None else self.inputs.cpu()
        return replace(self, codes=self.codes.cpu(), scales=self.scales.cpu(), inputs=inputs)
