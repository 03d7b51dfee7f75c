"""Uncompressed weights: stored row-major in their own dtype, the very tensor of the checkpoint.

No prepacked copy is made: it would double the resident bytes and break the sharing of one blob
between levels (and with a tied embedding).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.tensor import Dense, StoredLinear
from gateway.engine.kernels.native import Feature, NativeCall, dense_call, library
from gateway.engine.kernels.scheme import KernelLinear, PackChild, Scheme, UnpackChild, expect

# Measured: up to here the native product beats oneDNN's; beyond, oneDNN's blocking pays.
MAX_ROWS = 16
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
        dll = library(Feature.BF16)
        if dll is None or not self.weight.is_cpu or self.weight.dtype != torch.bfloat16:
            return None
        return dense_call(dll, self.weight, self.bias, max_rows=MAX_ROWS)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        weight = self.weight
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        source = x.to(weight.dtype)
        if weight.is_cpu and weight.dtype == torch.float32 and torch._C._has_mkldnn:
            # F.linear would take MKL's sgemm, twice as slow as oneDNN's on AMD.
            out: Tensor = torch.ops.mkldnn._linear_pointwise(source, weight, bias, "none", [], "")
        else:
            out = F.linear(source, weight, bias)
        return out.to(x.dtype)


SCHEME = Scheme(pack, unpack, DenseLinear)
