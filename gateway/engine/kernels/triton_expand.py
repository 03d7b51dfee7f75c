# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Dense rows of packed integer codes on CUDA: for products with many tokens, and for embeddings.

Triton kernels over the layout `vnni16`, for any bits, group and order of columns. Imported only
where Triton is (`native.fused`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.kernels.codes import Codes

_ROWS, _COLUMNS = 16, 256
_TAKE = 1024


@triton.jit
def _fields(  # noqa: PLR0917
    plane, row, column, stored, keep, W: tl.constexpr
):
    """int32 [rows, columns]: one plane's fields."""
    FIELDS: tl.constexpr = 8 // W
    base = (row // 16).to(tl.int64) * (stored * 2 * W) + (row % 16) * 4
    at = (column // (4 * FIELDS)) * 64 + column % 4
    byte = tl.load(plane + base + at, mask=keep, other=0).to(tl.int32)
    return (byte >> ((column // 4) % FIELDS * W)) & (2**W - 1)


@triton.jit(do_not_specialize=["start", "rows"])
def _expand(  # noqa: PLR0917
    plane0,
    plane1,
    plane2,
    scales,
    zeros,
    columns,
    index,
    out,
    start,
    rows,
    k,
    stored,
    groups,
    width,
    scale,
    offset,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = start + place
    if index is not None:
        row = tl.load(index + place, mask=place < rows, other=0)
    keep = (place < rows) & (column < stored)
    code = _fields(plane0, row, column, stored, keep, W0)
    if W1:
        code = code * F0 + _fields(plane1, row, column, stored, keep, W1) * F1
    if W2:
        code += _fields(plane2, row, column, stored, keep, W2)
    at = ((row // 16).to(tl.int64) * groups + column // width) * 16 + row % 16
    value = code.to(tl.float32)
    if zeros is not None:
        value -= tl.load(zeros + at, mask=keep, other=0).to(tl.float32) * ZERO + offset
    else:
        value -= offset
    value *= tl.load(scales + at, mask=keep, other=0.0).to(tl.float32) * scale
    if columns is not None:
        column = tl.load(columns + column, mask=column < stored, other=-1)
        keep &= column >= 0
    target = out + place.to(tl.int64) * k + column
    tl.store(target, value.to(out.dtype.element_ty), mask=keep & (column < k))


@triton.jit(do_not_specialize=["k", "stored"])
def _take(x, columns, out, k, stored, COLUMNS: tl.constexpr):  # noqa: PLR0917
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.load(columns + at, mask=at < stored, other=-1)
    v = tl.load(x + row * k + column, mask=column >= 0, other=0.0)
    tl.store(out + row * stored + at, v, mask=at < stored)


def take(x: Tensor, columns: Tensor) -> Tensor:
    """[M, len(columns)]: columns of x [M, K] in that order; zeros where the index is -1."""
    out = x.new_empty(len(x), columns.numel())
    grid = (triton.cdiv(columns.numel(), _TAKE), len(x))
    _take[grid](x, columns, out, x.shape[1], columns.numel(), _TAKE)
    return out


def expand(
    codes: Codes,
    columns: Tensor | None,
    k: int,
    dtype: torch.dtype,
    *,
    start: int = 0,
    stop: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Rows start..stop, or those of `index` (int64 [rows], each below N), in `dtype`: [rows, K].

    Args:
        columns: int32 [stored columns], the layer's column of each; -1 is padding.
    """
    device = codes.scales.device
    rows = stop - start if index is None else index.numel()
    out = torch.empty(rows, k, dtype=dtype, device=device)
    if not rows:
        return out
    planes = codes.planes
    stored = codes.scales.shape[1] * codes.width
    tile = _ROWS if index is None else 1
    grid = (triton.cdiv(stored, _COLUMNS), triton.cdiv(rows, tile))
    _expand[grid](
        planes[0],
        planes[min(1, len(planes) - 1)],
        planes[-1],
        codes.scales,
        codes.zeros,
        columns,
        index,
        out,
        start,
        rows,
        k,
        stored,
        codes.scales.shape[1],
        codes.width,
        codes.scale,
        codes.offset,
        *(*codes.widths, 0, 0)[:3],
        *(*codes.factors, 1)[:2],
        ZERO=codes.zero_factor,
        ROWS=tile,
        COLUMNS=_COLUMNS,
    )
    return out
