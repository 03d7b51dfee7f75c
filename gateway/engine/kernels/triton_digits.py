# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""One token as whole numbers: what a product of packed codes and one token reads (`triton_one`).

A token is given in three digits of base 256, with a scale for every group of columns: 22 bits below
the largest of a group. Imported only where Triton is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PLANES = 3
_MOST = tl.constexpr(4194304.0)  # 2²²: what the largest of a group becomes
_TINY = tl.constexpr(1e-30)


class Digits(NamedTuple):
    """One token [1, K] as Σ digit · 256^place · scale of the group.

    Attributes:
        planes: int8 [3, K]: digits from -128 to 127, the lowest first.
        grid: float32 [K / group, 4, 2]: for every place the scale of its digits, and that times
            their sum; the last place is empty.
    """

    planes: Tensor
    grid: Tensor


class Heads(NamedTuple):
    """Where a token's queries, keys and values go, rows of one weight in that order.

    Attributes:
        turns: float32 [2, dim]: cosines, and sines whose upper half is as it is.
        write: int32 [1]: the token's slot in the pool.
        keys, values: bf16 [blocks, block size, kv_heads, dim], dim a multiple of 32.
    """

    turns: Tensor
    write: Tensor
    keys: Tensor
    values: Tensor
    heads: int
    kv_heads: int
    dim: int


def make_digits(k: int, group: int, device: torch.device) -> Digits:
    """Room for one token of k columns."""
    planes = torch.empty(PLANES, k, dtype=torch.int8, device=device)
    return Digits(planes, torch.empty(k // group, 4, 2, dtype=torch.float32, device=device))


@triton.jit
def store_digits(  # noqa: PLR0917
    v, planes, grid, first, live, k, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    """Store fp32 v [ROWS, GROUP], groups from `first` on, as digits; `live` [ROWS]."""
    most = tl.max(tl.abs(v), 1)
    poison = tl.sum(v * 0.0, 1)  # NaN if any value is not finite
    inverse = tl.where(most > _TINY, _MOST / most, 0.0)
    scale = tl.where(most > _TINY, most / _MOST, 0.0) + poison
    whole = tl.floor(v * inverse[:, None] + 0.5).to(tl.int32)
    row = first + tl.arange(0, ROWS)
    at = planes + row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    table = grid + row * 8
    for place in tl.static_range(3):
        digit = ((whole + 128) & 255) - 128
        whole = (whole - digit) >> 8
        tl.store(at + place * k, digit.to(tl.int8), live[:, None])
        tl.store(table + place * 2, scale, live)
        tl.store(table + place * 2 + 1, scale * tl.sum(digit, 1).to(tl.float32), live)
        scale *= 256.0
    tl.store(table + 6, tl.zeros([ROWS], tl.float32), live)
    tl.store(table + 7, tl.zeros([ROWS], tl.float32), live)
