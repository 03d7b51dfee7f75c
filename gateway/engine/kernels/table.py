"""Tables in integer codes: rows looked up from the codes, and a head computed from the same ones.

Layout `rows`: the nested form `rows`, in the grouped layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressors.forms.table import Table
from compressors.tensor import Grouped, StoredLinear
from gateway.engine.kernels.grouped import BLOCK, PLANES, GroupedLinear
from gateway.engine.kernels.scheme import (
    KernelLinear,
    MakeChild,
    PackChild,
    Scheme,
    UnpackChild,
    nest,
    nested,
)


def pack(form: Table, child: PackChild) -> StoredLinear:
    n, k = form.shape
    return nest(StoredLinear("table", "rows", {"n": n, "k": k}, {}), rows=child(form.rows))


def unpack(stored: StoredLinear, child: UnpackChild) -> Table:
    rows = child(nested(stored, "rows"))
    if not isinstance(rows, Grouped):
        raise ValueError(f"stored table of {rows.scheme} rows")
    return Table(rows)


def head(
    stored: StoredLinear, bias: Tensor | None, _dtype: torch.dtype, child: MakeChild
) -> KernelLinear:
    """The table as an output head."""
    rows = child(nested(stored, "rows"), bias)
    if not isinstance(rows, GroupedLinear):
        raise ValueError("stored table without grouped rows")
    return rows


class TableEmbedding(nn.Module):
    """`forward(ids[...]) -> [..., H]` in `dtype`: the rows of those tokens, times `scale`.

    Attributes:
        rows: the very module that may also be the head.
        scale: a value of `dtype`.
    """

    def __init__(self, rows: GroupedLinear, dtype: torch.dtype, scale: float | Tensor) -> None:
        super().__init__()
        self.rows, self.dtype = rows, dtype
        self.scale = float(torch.tensor(float(scale), dtype=dtype))  # as the model's own code does

    def forward(self, ids: Tensor) -> Tensor:
        out = look_up(self.rows, ids.reshape(-1)).to(self.dtype)
        if self.scale != 1.0:
            out *= self.scale
        return out.view(*ids.shape, -1)


def look_up(table: GroupedLinear, index: Tensor) -> Tensor:
    """Rows `index` (int64 [M]) of the weight, float32 [M, K].

    Raises:
        IndexError: an index beyond the table's last block of rows.
    """
    if table._packed is not None:
        return table._packed.look_up(index, torch.float32)
    block, lane = index // BLOCK, index % BLOCK
    codes: Tensor | None = None
    for plane, shift in PLANES[table.bits]:
        # Four neighbouring bytes belong to one row: taken as one word.
        words = table.get_buffer(f"codes{plane}").view(torch.int32)
        packed = words[block, :, lane].view(torch.uint8).view(len(index), -1, 1, 4)
        shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=index.device).view(-1, 1)
        part = (packed >> shifts & (1 << plane) - 1).view(len(index), -1) << shift
        codes = part if codes is None else codes | part
    assert codes is not None
    zeros, scales = table.zeros, table.scales[block, :, lane].float()
    out = codes.view(len(index), scales.shape[1], table.width).float()
    middle = 2 ** (table.bits - 1)
    if zeros is None:
        out -= middle
    else:
        offset = 0 if zeros.dtype == torch.uint8 else middle
        out -= (zeros[block, :, lane].float() + offset).unsqueeze(-1)
    out *= (scales * 2.0**table.exponent).unsqueeze(-1)
    weight = out.flatten(1)
    place = table.place
    return weight[:, : table.in_features] if place is None else weight[:, place]


SCHEME = Scheme(pack, unpack, head)
