# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Small steps around eight-bit products on CUDA, each one launch: Triton kernels.

Rounding a token takes torch seven launches and scaling a product four; in a decode step these cost
more than the product. Imported only where Triton is (it comes with torch's CUDA builds).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and taking it away rounds to whole numbers
_TINY = tl.constexpr(1e-30)
BLOCK_ROWS = 16
# Measured on an H200 at 14336 × 4096 and 4096 × 14336: about 3 TB/s of weights at 1 to 16 rows.
_WIDTH, _DEPTH, _WARPS, _STAGES = 32, 256, 4, 4
_BLOCK_COLUMNS = 1024


@triton.jit
def _round(  # noqa: PLR0917
    x, inputs, codes, steps, k, levels, BLOCK: tl.constexpr, FLOAT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK], tl.float32)
    poison = tl.zeros([BLOCK], tl.float32)  # NaN if any value is not finite
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * k + at, mask=at < k, other=0.0).to(tl.float32)
        if inputs is not None:
            v *= tl.load(inputs + at, mask=at < k, other=0.0)
        top = tl.maximum(top, tl.abs(v))
        poison += v * 0.0
    most = tl.max(top, 0)
    inverse = tl.where(most > _TINY, levels / most, 0.0)
    tl.store(steps + row, most / levels + tl.sum(poison, 0))
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * k + at, mask=at < k, other=0.0).to(tl.float32)
        if inputs is not None:
            v *= tl.load(inputs + at, mask=at < k, other=0.0)
        v *= inverse
        if FLOAT:
            tl.store(codes + row * k + at, v.to(tl.float8e4nv), mask=at < k)
        else:
            tl.store(codes + row * k + at, (v + _ROUND - _ROUND).to(tl.int8), mask=at < k)


def round_rows(x: Tensor, inputs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (int8 or float8_e4m3fn) [M, K] and steps float32 [M, 1] of x [M, K] times `inputs`."""
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=dtype, device=x.device)
    steps = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    real = dtype != torch.int8
    block = min(4096, triton.next_power_of_2(k))
    if rows:
        levels = 448.0 if real else 127.0
        _round[(rows,)](x.contiguous(), inputs, codes, steps, k, levels, block, real, num_warps=8)
    return codes, steps


@triton.jit
def _scale(  # noqa: PLR0917
    sums, steps, scales, bias, out, n, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(sums + row * n + at, mask=at < n, other=0).to(tl.float32)
    v = v * tl.load(steps + row) * tl.load(scales + at, mask=at < n, other=0.0)
    if bias is not None:
        v += tl.load(bias + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + at, v.to(out.dtype.element_ty), mask=at < n)


def scale(
    sums: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`sums * steps * scales + bias` of int32 sums [M, N], in `dtype`."""
    rows, n = sums.shape
    out = torch.empty(rows, n, dtype=dtype, device=sums.device)
    if rows:
        grid = (rows, triton.cdiv(n, _BLOCK_COLUMNS))
        _scale[grid](sums, steps, scales, bias, out, n, _BLOCK_COLUMNS)
    return out


@triton.jit
def _product(  # noqa: PLR0917
    codes,
    steps,
    weight,
    scales,
    bias,
    out,
    rows,
    n,
    k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.arange(0, BK)
    x = codes + m[:, None].to(tl.int64) * k + column[None, :]
    w = weight + at[None, :].to(tl.int64) * k + column[:, None]
    sums = tl.zeros([BM, BN], tl.int32)
    for start in range(0, k, BK):
        keep = column < k - start
        a = tl.load(x + start, mask=(m[:, None] < rows) & keep[None, :], other=0)
        b = tl.load(w + start, mask=(at[None, :] < n) & keep[:, None], other=0)
        sums = tl.dot(a, b, acc=sums, out_dtype=tl.int32)
    v = sums.to(tl.float32) * tl.load(steps + m, mask=m < rows, other=0.0)[:, None]
    v *= tl.load(scales + at, mask=at < n, other=0.0)[None, :]
    if bias is not None:
        v += tl.load(bias + at, mask=at < n, other=0.0).to(tl.float32)[None, :]
    place = out + m[:, None].to(tl.int64) * n + at[None, :]
    tl.store(place, v.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (at[None, :] < n))


def product(
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The whole layer on codes int8 [M, K] and weight int8 [N, K] of any size: the weight is read
    once for every BLOCK_ROWS rows."""
    (rows, k), n = codes.shape, weight.shape[0]
    out = torch.empty(rows, n, dtype=dtype, device=codes.device)
    if rows:
        grid = (triton.cdiv(n, _WIDTH), triton.cdiv(rows, BLOCK_ROWS))
        _product[grid](
            codes,
            steps,
            weight,
            scales,
            bias,
            out,
            rows,
            n,
            k,
            BLOCK_ROWS,
            _WIDTH,
            _DEPTH,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return out
