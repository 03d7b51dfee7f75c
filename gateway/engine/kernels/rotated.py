"""Rotated inputs: a sign and a Hadamard product per block of columns, then the layer inside.

Layout `blocks`: `signs` int8 [K], and the nested form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.rotated import Rotated, mixed
from compressors.tensor import StoredLinear
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

MAX_BLOCK = 4096  # bounds the Hadamard matrix that a damaged manifest can ask for


def pack(form: Rotated, child: PackChild) -> StoredLinear:
    n, k = form.shape
    meta: dict[str, int | float | str | bool] = {"n": n, "k": k, "block": form.block}
    outer = StoredLinear("rotated", "blocks", meta, {"signs": form.signs.contiguous()})
    return nest(outer, form=child(form.form))


def unpack(stored: StoredLinear, child: UnpackChild) -> Rotated:
    inner = child(nested(stored, "form"))
    return Rotated(inner, stored.tensors["signs"], int(stored.meta["block"]))


class RotatedLinear(KernelLinear):
    """`form(H (signs * x))`; the rotation is done in float32 and rounded once to x's dtype."""

    signs: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, None, dtype)
        self.hold(stored, "signs")
        expect(self.signs, (self.in_features,), torch.int8)
        self.block = int(stored.meta["block"])
        power = 0 < self.block <= MAX_BLOCK and not self.block & (self.block - 1)
        if not power or self.in_features % self.block:
            raise ValueError(f"{self.in_features} columns in Hadamard blocks of {self.block}")
        self.form = child(nested(stored, "form"), bias)
        if (self.form.out_features, self.form.in_features) != (self.out_features, self.in_features):
            raise ValueError(f"rotated layer of shape {self.form.extra_repr()}")

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        rows = self.form.dense_rows(start, stop, exact)
        return (mixed(rows, self.block) * self.signs).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.form(mixed(x.float() * self.signs, self.block).to(x.dtype))
        return out


SCHEME = Scheme(pack, unpack, RotatedLinear)
