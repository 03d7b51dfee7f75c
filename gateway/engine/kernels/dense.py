"""Uncompressed weights: stored row-major in their own dtype, the very tensor of the checkpoint.

No prepacked copy is made: it would double the resident bytes and break the sharing of one blob
between levels (and with a tied embedding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.tensor import Dense, StoredLinear
from gateway.engine.kernels.native import Feature, NativeCall, dense_call, library
from gateway.engine.kernels.scheme import (
    KernelLinear,
    PackChild,
    Scheme,
    UnpackChild,
    expect,
    product,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        expect(self.weight, (self.out_features, self.in_features), *DTYPES)
        self._call = self.bind()

    def bind(self) -> NativeCall | None:
        dll = library(Feature.BF16 if self.weight.dtype == torch.bfloat16 else Feature.INT8)
        if dll is None or not self.weight.is_cpu:
            return None
        return dense_call(dll, self.weight, self.bias)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float16 and x.is_cpu and x.numel() > 2 * self.in_features:
            # torch's fp16 product is slow here: piece by piece in float32 takes 1/2 to 1/8.
            return super().reference(x.float()).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return product(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


SCHEME = Scheme(pack, unpack, DenseLinear)
