"""Low-rank pairs: two stored linears, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.tensor import LowRank, StoredLinear
from gateway.engine.kernels.scheme import (
    KernelLinear,
    MakeChild,
    PackChild,
    Scheme,
    UnpackChild,
    nest,
    nested,
)


def pack(form: LowRank, child: PackChild) -> StoredLinear:
    n, k = form.shape
    outer = StoredLinear("lowrank", "pair", {"n": n, "k": k}, {})
    return nest(outer, left=child(form.left), right=child(form.right))


def unpack(stored: StoredLinear, child: UnpackChild) -> LowRank:
    return LowRank(left=child(nested(stored, "left")), right=child(nested(stored, "right")))


class LowRankLinear(KernelLinear):
    """`left(right(x))`: K·r + r·N multiplications instead of K·N."""

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, None, dtype)
        self.right = child(nested(stored, "right"), None)
        self.left = child(nested(stored, "left"), bias)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        left = self.left.dense_rows(start, stop, torch.float32)
        right = self.right.dense_rows(0, self.right.out_features, torch.float32)
        return (left @ right).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.left(self.right(x))
        return out


SCHEME = Scheme(pack, unpack, LowRankLinear)
