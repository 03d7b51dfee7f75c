"""Two precisions in one layout: a stored 4-bit layer, and beside it the parent's low plane.

Layout `vnni16x2`: the nested form `child` (scheme `grouped`, a layer that can be served alone) and
`low`, a second 4-bit plane [blocks, units, 64] in the order of the child's `codes4`. Scales, zeros
and column order are the child's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressors.forms.nested import CHILD_BITS, RATIO, Nested
from compressors.tensor import Grouped, StoredLinear
from gateway.engine.kernels.codes import Codes
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.native import Feature, NativeCall, library
from gateway.engine.kernels.on_cuda import packed_call
from gateway.engine.kernels.scheme import (
    KernelLinear,
    MakeChild,
    PackChild,
    Scheme,
    UnpackChild,
    nest,
    nested,
)

_NATIVE_BITS = 9  # what grouped.h calls two planes of four bits, the first times RATIO
_EXPONENT = RATIO.bit_length() - 1


def pack(form: Nested, child: PackChild) -> StoredLinear:
    n, k = form.shape
    if form.child.bits != CHILD_BITS or form.low.shape != (n, k):
        raise ValueError(f"{form.child.bits}-bit codes with a low plane {tuple(form.low.shape)}")
    low = child(replace(form.child, codes=form.low)).tensors["codes4"]
    outer = StoredLinear("nested", "vnni16x2", {"n": n, "k": k}, {"low": low})
    return nest(outer, child=child(form.child))


def unpack(stored: StoredLinear, child: UnpackChild) -> Nested:
    high, low = child(nested(stored, "child")), child(_refinement(stored))
    assert isinstance(high, Grouped)
    assert isinstance(low, Grouped)
    return Nested(high, low.codes)


def child_of(stored: StoredLinear) -> StoredLinear:
    """The 4-bit layer inside, on the same tensors; any other stored layer as it is."""
    return nested(stored, "child") if stored.scheme == "nested" else stored


def _refinement(stored: StoredLinear) -> StoredLinear:
    """What the low plane adds, as a symmetric 4-bit layer on the child's scales."""
    inner = nested(stored, "child")
    tensors = {suffix: t for suffix, t in inner.tensors.items() if suffix in ("scales", "columns")}
    exponent = int(inner.meta["scale_exponent"]) - _EXPONENT
    return StoredLinear(
        inner.scheme,
        inner.layout,
        dict(inner.meta) | {"scale_exponent": exponent},
        tensors | {"codes4": stored.tensors["low"]},
    )


class NestedLinear(KernelLinear):
    """The parent: both planes in one integer product, or the sum of two layers through torch."""

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, bias, dtype)
        self.child = _plane(child(nested(stored, "child"), None), self.extra_repr())
        self.low = _plane(child(_refinement(stored), None), self.extra_repr())
        self._call = self.bind()

    def bind(self) -> NativeCall | None:
        if self.low.scales is not self.child.scales:  # a move to a device makes two of one
            self.low.scales, self.low.columns = self.child.scales, self.child.columns
            self.low._call = self.low.bind()
        columns = self.child.columns
        self._packed = packed_call(self.packed(), columns, self.in_features, self.bias)
        dll = library(Feature.INT8 | Feature.NESTED)
        if dll is None or not self.child.scales.is_cpu:
            return None
        bias = None if self.bias is None else self.bias.float()
        struct = self.child.describe(bias)
        struct.planes[1] = self.low.get_buffer("codes4").data_ptr()
        struct.bits, struct.scale = _NATIVE_BITS, struct.scale / RATIO
        keep = (*self.buffers(), bias)
        return NativeCall(
            dll, "pressgate_grouped", struct, keep, max_rows=1 << 30, bf16_input=False
        )

    def packed(self) -> Codes:
        """The layer as kernels on a GPU see it: s/16 · (16 · code + low - 16 · zero - 8)."""
        inner, low = self.child.packed(), self.low.packed()
        return replace(
            inner,
            planes=inner.planes + low.planes,
            widths=inner.widths + low.widths,
            factors=(RATIO, 1),
            scale=inner.scale / RATIO,
            zero_factor=RATIO,
            offset=RATIO * inner.offset + low.offset,
        )

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self._packed is not None:
            return self._packed.rows(start, stop, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        high = self.child.dense_rows(start, stop, exact)
        return high.add_(self.low.dense_rows(start, stop, exact)).to(dtype)


def _plane(layer: KernelLinear, shape: str) -> GroupedLinear:
    if (
        not isinstance(layer, GroupedLinear)
        or layer.bits != CHILD_BITS
        or layer.extra_repr().partition(",")[0] != shape.partition(",")[0]
    ):
        raise ValueError(f"a nested layer {shape} is stored as two planes of 4 bits")
    return layer


SCHEME = Scheme(pack, unpack, NestedLinear)
