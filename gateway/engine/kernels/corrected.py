"""Corrected layers: the compressed layer and a low-rank pair on the same input, added up.

Layout `sum`: the nested forms `base` and `correction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.corrected import Corrected
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


def pack(form: Corrected, child: PackChild) -> StoredLinear:
    n, k = form.shape
    outer = StoredLinear("corrected", "sum", {"n": n, "k": k}, {})
    return nest(outer, base=child(form.base), correction=child(form.correction))


def unpack(stored: StoredLinear, child: UnpackChild) -> Corrected:
    correction = child(nested(stored, "correction"))
    assert isinstance(correction, LowRank)
    return Corrected(child(nested(stored, "base")), correction)


class CorrectedLinear(KernelLinear):
    """`base(x) + left(right(x))`."""

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, None, dtype)
        self.base = child(nested(stored, "base"), bias)
        self.correction = child(nested(stored, "correction"), None)
        for part in (self.base, self.correction):
            if (part.out_features, part.in_features) != (self.out_features, self.in_features):
                raise ValueError(f"a corrected layer is stored with {part.extra_repr()}")

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        base = self.base.dense_rows(start, stop, exact)
        return (base + self.correction.dense_rows(start, stop, exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.correction(x)
        return out


SCHEME = Scheme(pack, unpack, CorrectedLinear)
