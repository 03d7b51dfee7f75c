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

_COLUMNS = 256
_TAKE = 1024


@triton.jit
def _block(plane, block, first, stored, W: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: PLR0917
    """int32 [16, COLUMNS]: one plane's fields of a block of rows."""
    FIELDS: tl.constexpr = 32 // W  # of a word: columns of one row
    u = first // FIELDS + tl.arange(0, COLUMNS // FIELDS)[:, None]
    r = tl.arange(0, 16)[None, :]
    units = stored // FIELDS
    w = tl.load(plane + (block * units + u) * 16 + r, mask=u < units, other=0)
    c = tl.arange(0, FIELDS)[None, None, :]
    v = (w[:, :, None] >> (8 * (c % 4) + W * (c // 4))) & (2**W - 1)
    return tl.reshape(tl.permute(v, 1, 0, 2), [16, COLUMNS])


@triton.jit(do_not_specialize=["start", "stop"])
def _expand(  # noqa: PLR0917
    plane0,
    plane1,
    plane2,
    scales,
    zeros,
    columns,
    out,
    start,
    stop,
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
    COLUMNS: tl.constexpr,
):
    block = start // 16 + tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * COLUMNS
    code = _block(plane0, block, first, stored, W0, COLUMNS)
    if W1:
        code = code * F0 + _block(plane1, block, first, stored, W1, COLUMNS) * F1
    if W2:
        code += _block(plane2, block, first, stored, W2, COLUMNS)
    r = tl.arange(0, 16)[:, None]
    # A group is a whole number of sixteen columns.
    piece = first + tl.arange(0, COLUMNS // 16)[None, :] * 16
    at = (block * groups + piece // width) * 16 + r
    keep = piece < stored
    if zeros is not None:
        zero = tl.load(zeros + at, mask=keep, other=0).to(tl.float32) * ZERO + offset
    else:
        zero = tl.full([16, COLUMNS // 16], 0.0, tl.float32) + offset
    step = tl.load(scales + at, mask=keep, other=0.0).to(tl.float32) * scale
    value = tl.reshape(code, [16, COLUMNS // 16, 16]).to(tl.float32)
    value = tl.reshape((value - zero[:, :, None]) * step[:, :, None], [16, COLUMNS])
    row = block * 16 + r
    column = first + tl.arange(0, COLUMNS)[None, :]
    inside = (row >= start) & (row < stop) & (column < stored)
    if columns is not None:
        column = tl.load(columns + column, mask=column < stored, other=-1)
        inside &= column >= 0
    target = out + (row - start) * k + column
    tl.store(target, value.to(out.dtype.element_ty), mask=inside & (column < k))


@triton.jit
def _fields(plane, row, column, stored, W: tl.constexpr):
    """int32 [columns]: one plane's fields of a row."""
    FIELDS: tl.constexpr = 8 // W
    base = (row // 16) * (stored * 2 * W) + (row % 16) * 4
    at = (column // (4 * FIELDS)) * 64 + column % 4
    byte = tl.load(plane + base + at, mask=column < stored, other=0).to(tl.int32)
    return (byte >> ((column // 4) % FIELDS * W)) & (2**W - 1)


@triton.jit
def _look_up(  # noqa: PLR0917
    plane0,
    plane1,
    plane2,
    scales,
    zeros,
    columns,
    out,
    index,
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
    COLUMNS: tl.constexpr,
):
    row = tl.load(index + tl.program_id(1)).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    code = _fields(plane0, row, column, stored, W0)
    if W1:
        code = code * F0 + _fields(plane1, row, column, stored, W1) * F1
    if W2:
        code += _fields(plane2, row, column, stored, W2)
    at = ((row // 16) * groups + column // width) * 16 + row % 16
    keep = column < stored
    value = code.to(tl.float32)
    if zeros is not None:
        value -= tl.load(zeros + at, mask=keep, other=0).to(tl.float32) * ZERO + offset
    else:
        value -= offset
    value *= tl.load(scales + at, mask=keep, other=0.0).to(tl.float32) * scale
    if columns is not None:
        column = tl.load(columns + column, mask=keep, other=-1)
        keep &= column >= 0
    target = out + tl.program_id(1).to(tl.int64) * k + column
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
    codes: Codes, columns: Tensor | None, k: int, dtype: torch.dtype, *, start: int, stop: int
) -> Tensor:
    """Rows start..stop in `dtype`: [stop-start, k].

    Args:
        columns: int32 [stored columns], the layer's column of each; -1 is padding.
    """
    out = torch.empty(stop - start, k, dtype=dtype, device=codes.scales.device)
    if stop > start:
        planes = tuple(plane.view(torch.int32) for plane in codes.planes)
        stored = codes.scales.shape[1] * codes.width
        grid = (triton.cdiv(stored, _COLUMNS), triton.cdiv(stop, 16) - start // 16)
        head = (*_three(planes), codes.scales, codes.zeros, columns, out, start, stop)
        _expand[grid](*head, k, stored, *_format(codes), ZERO=codes.zero_factor, COLUMNS=_COLUMNS)
    return out


def look_up(
    codes: Codes, columns: Tensor | None, k: int, dtype: torch.dtype, index: Tensor
) -> Tensor:
    """Rows `index` (int64 [M], each below N) in `dtype`: [M, k]."""
    out = torch.empty(index.numel(), k, dtype=dtype, device=codes.scales.device)
    if index.numel():
        stored = codes.scales.shape[1] * codes.width
        grid = (triton.cdiv(stored, _COLUMNS), index.numel())
        head = (*_three(codes.planes), codes.scales, codes.zeros, columns, out, index)
        _look_up[grid](*head, k, stored, *_format(codes), ZERO=codes.zero_factor, COLUMNS=_COLUMNS)
    return out


def _three(planes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's three planes; those that are not there are not read."""
    return planes[0], planes[min(1, len(planes) - 1)], planes[-1]


def _format(codes: Codes) -> tuple[object, ...]:
    widths, factors = (*codes.widths, 0, 0)[:3], (*codes.factors, 1)[:2]
    return codes.scales.shape[1], codes.width, codes.scale, codes.offset, *widths, *factors
