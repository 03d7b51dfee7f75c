"""Uncompressed weights: stored row-major in their own dtype, the very tensor of the checkpoint.

No prepacked copy is made: it would double the resident bytes and break the sharing of one blob
between levels (and with a tied embedding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.tensor import Dense, StoredLinear
from gateway.engine.kernels.scheme import KernelLinear, PackChild, Scheme, UnpackChild


def pack(form: Dense, _child: PackChild) -> StoredLinear:
    n, k = form.shape
    return StoredLinear(
        "dense", "rowmajor", {"n": n, "k": k}, {"weight": form.weight.detach().contiguous()}
    )


def unpack(stored: StoredLinear, _child: UnpackChild) -> Dense:
    return Dense(stored.tensors["weight"])


class DenseLinear(KernelLinear):
    """`x @ W.T` from the mapped row-major weight. Activations are brought to the weight's dtype."""

    weight: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, _child: object
    ) -> None:
        super().__init__(stored, bias, dtype)
        self.hold(stored, "weight")

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


SCHEME = Scheme(pack, unpack, DenseLinear)
