"""Outlier columns in 16 bits beside a layer of fewer bits: two products, one sum.

Layout `columns`: `columns` int32 [O], and the nested forms `rest` [N, K] and `values` [N, O].
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.outlier import Outlier
from compressors.tensor import Dense, StoredLinear
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


def pack(form: Outlier, child: PackChild) -> StoredLinear:
    n, k = form.shape
    columns = form.columns.to(torch.int32).contiguous()
    _check(columns, k)
    outer = StoredLinear("outlier", "columns", {"n": n, "k": k}, {"columns": columns})
    return nest(outer, rest=child(form.rest), values=child(form.values))


def unpack(stored: StoredLinear, child: UnpackChild) -> Outlier:
    values = child(nested(stored, "values"))
    if not isinstance(values, Dense):
        raise ValueError(f"stored outlier columns in a {values.scheme} form")
    return Outlier(child(nested(stored, "rest")), values, stored.tensors["columns"])


def _check(columns: Tensor, k: int) -> None:
    """Columns index the inputs: none may lie outside.

    Raises:
        ValueError: they do, or are none.
    """
    if not columns.numel() or int(columns.min()) < 0 or int(columns.max()) >= k:
        raise ValueError(f"stored outlier columns outside a layer of {k} inputs")


class OutlierLinear(KernelLinear):
    """`rest(x) + values(x[columns])`."""

    columns: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, child: MakeChild
    ) -> None:
        super().__init__(stored, None, dtype)
        self.hold(stored, "columns")
        expect(self.columns, (self.columns.numel(),), torch.int32)
        _check(self.columns, self.in_features)
        self.rest = child(nested(stored, "rest"), bias)
        self.values = child(nested(stored, "values"), None)
        shapes = [(m.out_features, m.in_features) for m in (self.rest, self.values)]
        n = self.out_features
        if shapes != [(n, self.in_features), (n, self.columns.numel())]:
            raise ValueError(f"stored outlier layer of shapes {shapes}")

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        out = self.rest.dense_rows(start, stop, dtype)
        out[:, self.columns] = self.values.dense_rows(start, stop, dtype)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(x)
        return out.add_(self.values(x.index_select(-1, self.columns)))


SCHEME = Scheme(pack, unpack, OutlierLinear)
