"""2:4 sparse weights: kept values plus one bit per column, 9 bits per weight in bf16.

Layout `bitmap`: `mask` uint8 [N, Kp/8] has bit j of byte i set when column 8·i+j is kept (exactly
two in every four); Kp is K padded to 32, padding keeps its first two columns with value 0, so
that any run of 32 columns owns exactly 16 values. A bit per column costs the same as a 2-bit
index per kept value and is what an expand instruction takes. Values are [N, Kp/2]: row-major when
dense, or a nested form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.tensor import Dense, LinearForm, Sparse24, StoredLinear
from gateway.engine.kernels.dense import DenseLinear
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.native import Feature, NativeCall, library, sparse_call
from gateway.engine.kernels.scheme import (
    KernelLinear,
    MakeChild,
    PackChild,
    Scheme,
    UnpackChild,
    expect,
    nest,
    nested,
)

# Measured: beyond, expanding the weight piece by piece for oneDNN's bf16 product is faster.
MAX_ROWS = 32
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(form: Sparse24, child: PackChild) -> StoredLinear:
    n, k = form.shape
    if k % 4 or form.values.shape != (n, k // 2):
        raise ValueError(f"2:4 sparse weight of shape {form.shape}, values {form.values.shape}")
    padded = -(-k // 32) * 32
    keep = torch.zeros(n, padded // 4, 4, dtype=torch.uint8, device=form.index.device)
    keep[:, k // 4 :, :2] = 1
    keep[:, : k // 4].scatter_(2, form.index.view(n, k // 4, 2).long(), 1)
    if int(keep.sum()) != n * padded // 2:
        raise ValueError("2:4 index keeps a column twice")
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=keep.device)
    mask = (keep.view(n, padded // 8, 8) * weights).sum(-1, dtype=torch.uint8)
    stored = StoredLinear("sparse24", "bitmap", {"n": n, "k": k}, {"mask": mask})
    return nest(stored, values=child(_pad_values(form.values, padded // 2)))


def _pad_values(values: LinearForm, width: int) -> LinearForm:
    if isinstance(values, Dense):
        return Dense(F.pad(values.weight, (0, width - values.shape[1])))
    return values


def unpack(stored: StoredLinear, child: UnpackChild) -> Sparse24:
    k = int(stored.meta["k"])
    values = child(nested(stored, "values"))
    if isinstance(values, Dense):
        values = replace(values, weight=values.weight[:, : k // 2])
    n = int(stored.meta["n"])
    keep = _columns(stored.tensors["mask"])[:, :k].view(n, k // 4, 4)
    index = torch.argsort(keep.to(torch.uint8), dim=2, descending=True, stable=True)[:, :, :2]
    return Sparse24(values=values, index=index.reshape(n, k // 2).to(torch.uint8))


def _columns(mask: Tensor) -> Tensor:
    """bool [rows, Kp]: which columns are kept."""
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) & bits).ne(0).flatten(1)


class Sparse24Linear(KernelLinear):
    """Computes from values and mask."""

    mask: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, bias, dtype)
        self.hold(stored, "mask")
        self.values = child(nested(stored, "values"), None)
        width = -(-self.in_features // 32) * 16
        whole = isinstance(self.values, DenseLinear)
        expect(self.mask, (self.out_features, width // 4), torch.uint8)
        if self.values.out_features != self.out_features or self.values.in_features != (
            width if whole else self.in_features // 2
        ):
            raise ValueError(f"2:4 sparse values of shape {self.values.extra_repr()}")
        self._call = self.bind()

    def bind(self) -> NativeCall | None:
        dll, inner = library(Feature.SPARSE), self.values
        values: Tensor | NativeCall | None = None
        if isinstance(inner, DenseLinear) and inner.weight.dtype == torch.bfloat16:
            values = inner.weight
        elif isinstance(inner, GroupedLinear) and inner.columns is None:
            values = inner._call
        if dll is None or values is None or not self.mask.is_cpu:
            return None
        return sparse_call(dll, values, self.mask, self.bias, k=self.in_features, max_rows=MAX_ROWS)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self._call is not None and dtype == torch.bfloat16:
            return self._call.expand(start, stop)
        keep = _columns(self.mask[start:stop])
        values = self.values.dense_rows(start, stop, dtype)
        values = F.pad(values, (0, keep.shape[1] // 2 - values.shape[1]))
        out = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        return out.masked_scatter_(keep, values)[:, : self.in_features]


SCHEME = Scheme(pack, unpack, Sparse24Linear)
