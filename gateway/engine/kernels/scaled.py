"""Scaled inputs: one multiplication per input column, then the layer inside.

Layout `columns`: `scale` float32 [K], and the nested form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.scaled import Scaled
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


def pack(form: Scaled, child: PackChild) -> StoredLinear:
    n, k = form.shape
    if tuple(form.scale.shape) != (k,) or not bool(torch.isfinite(form.scale).all()):
        raise ValueError(f"input scale {tuple(form.scale.shape)} for {k} columns, or not finite")
    scale = form.scale.to(torch.float32).contiguous()
    outer = StoredLinear("scaled", "columns", {"n": n, "k": k}, {"scale": scale})
    return nest(outer, form=child(form.form))


def unpack(stored: StoredLinear, child: UnpackChild) -> Scaled:
    return Scaled(child(nested(stored, "form")), stored.tensors["scale"])


class ScaledLinear(KernelLinear):
    """`form(x * scale)`; the product is taken in float32 and rounded once to x's dtype."""

    scale: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, None, dtype)
        self.hold(stored, "scale")
        expect(self.scale, (self.in_features,), torch.float32)
        self.form = child(nested(stored, "form"), bias)
        if (self.form.out_features, self.form.in_features) != (self.out_features, self.in_features):
            raise ValueError(f"scaled layer of shape {self.form.extra_repr()}")

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.form.dense_rows(start, stop, exact) * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.form((x * self.scale).to(x.dtype))
        return out


SCHEME = Scheme(pack, unpack, ScaledLinear)
