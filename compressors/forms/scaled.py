"""A form behind a diagonal: the layer's inputs are scaled before they meet the weight.

AWQ (arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) move magnitude between a weight's columns
and the inputs that meet them: `W x = (W diag(1/s)) (diag(s) x)`. The form of the scaled weight and
`s` travel together, so that it works in any architecture, whatever gives the layer its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressors.tensor import LinearForm


@dataclass(frozen=True, eq=False)
class Scaled(LinearForm):
    """`y = form(x * scale)`, so the weight it stands for is `form.dense() * scale`.

    Attributes:
        form: of shape [N, K].
        scale: float32 [K], finite.
    """

    form: LinearForm
    scale: Tensor
    scheme: ClassVar[str] = "scaled"

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.shape

    @property
    def nbytes(self) -> int:
        return self.form.nbytes + 4 * self.scale.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.form.dense(exact) * self.scale).to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Scaled:
        return Scaled(self.form.stored_as(dtype), self.scale.to("cpu", torch.float32))
