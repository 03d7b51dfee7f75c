"""Sparse weights: kept values plus one bit per column, 9 bits per weight in bf16 at half kept.

Layout `bitmap`: `mask` uint8 [N, Kp/8] has bit j of byte i set when column 8·i+j is kept; Kp is K
padded to 32. Values are row-major, in column order. Where every whole run of 32 columns owns 16
values (4:8, and 2:4 of `sparse24`) the layer is *even*: dense values are then padded to 16 per run
begun, so that a run's values are found without counting. A bit per column is what an expand
instruction takes. The layer computes from the bitmap; at most pieces of it are ever dense.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.forms.sparse import Bitmap
from compressors.tensor import Dense, Meta, StoredLinear
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


def pack(form: Bitmap, child: PackChild) -> StoredLinear:
    (n, k), kept = form.shape, form.values.shape[1]
    if form.mask.dtype != torch.bool or not bool((form.mask.sum(1) == kept).all()):
        raise ValueError(f"a sparse weight of shape {form.shape} does not keep {kept} in every row")
    whole = k // 32 * 32
    runs = form.mask[:, :whole].reshape(n, -1, 32).sum(-1)
    even = bool((runs == 16).all()) and kept - whole // 2 <= 16
    values = form.values
    if even and isinstance(values, Dense):
        values = Dense(F.pad(values.weight, (0, even_width(k) - kept)))
    meta: Meta = {"n": n, "k": k, "kept": kept, "even": even}
    stored = StoredLinear("sparse", "bitmap", meta, {"mask": pack_mask(form.mask)})
    return nest(stored, values=child(values))


def unpack(stored: StoredLinear, child: UnpackChild) -> Bitmap:
    k, kept = int(stored.meta["k"]), int(stored.meta["kept"])
    values = child(nested(stored, "values"))
    if isinstance(values, Dense):
        values = replace(values, weight=values.weight[:, :kept])
    return Bitmap(values, unpack_mask(stored.tensors["mask"])[:, :k])


def even_width(k: int) -> int:
    """Values per row of an even layer with k columns, padding included."""
    return -(-k // 32) * 16


def pack_mask(mask: Tensor) -> Tensor:
    """bool [N, K] → uint8 [N, Kp/8]; padding is not kept."""
    padded = F.pad(mask, (0, -mask.shape[1] % 32)).to(torch.uint8)
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    return (padded.view(len(mask), -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor) -> Tensor:
    """uint8 [rows, Kp/8] → bool [rows, Kp]: which columns are kept."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> places & 1).ne(0).flatten(1)


class BitmapLinear(KernelLinear):
    """Computes from values and mask."""

    mask: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, bias, dtype)
        self.kept, self.even = self._pattern(stored)
        self.hold(stored, "mask")
        self.values = child(nested(stored, "values"), None)
        expect(self.mask, (self.out_features, even_width(self.in_features) // 4), torch.uint8)
        padded = self.even and isinstance(self.values, DenseLinear)
        width = even_width(self.in_features) if padded else self.kept
        if (self.values.out_features, self.values.in_features) != (self.out_features, width):
            raise ValueError(f"sparse values stored as {self.values.extra_repr()}")
        if self.even and self.kept > even_width(self.in_features):
            raise ValueError(f"{self.kept} values stored for {self.in_features} columns")
        self._call = self.bind()

    def _pattern(self, stored: StoredLinear) -> tuple[int, bool]:
        """Values per row, padding aside, and whether the layer is even."""
        return int(stored.meta["kept"]), bool(stored.meta["even"])

    def bind(self) -> NativeCall | None:
        dll, inner = library(Feature.SPARSE), self.values
        values: Tensor | NativeCall | None = None
        if isinstance(inner, DenseLinear) and inner.weight.dtype == torch.bfloat16:
            values = inner.weight
        elif isinstance(inner, GroupedLinear) and inner.columns is None:
            values = inner._call
        if dll is None or values is None or not self.mask.is_cpu:
            return None
        return sparse_call(
            dll,
            values,
            self.mask,
            self.bias,
            k=self.in_features,
            max_rows=MAX_ROWS,
            ragged=not self.even,
        )

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self._call is not None and dtype == torch.bfloat16:
            return self._call.expand(start, stop)
        keep = unpack_mask(self.mask[start:stop])[:, : self.in_features]
        values = self.values.dense_rows(start, stop, dtype)[:, : self.kept]
        if keep.is_cuda:  # a masked scatter waits for the device
            rank = keep.cumsum(1).sub_(1).clamp_(min=0)
            return values.gather(1, rank).mul_(keep)
        out = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        return out.masked_scatter_(keep, values)


SCHEME = Scheme(pack, unpack, BitmapLinear)
