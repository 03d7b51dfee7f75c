# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Eight-bit weights times eight-bit inputs on CUDA for a few tokens: int8 and E4M3, row-major.

Triton kernels. Both operands are read in 16-byte pieces straight into the registers of a
tensor-core product, in the same order of columns; no shared memory. The warps of a program share
out the columns and are added up in a fixed order. A single token is rounded inside. Imported only
where Triton is (`native.fused`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.kernels.codes import Tiling
from gateway.engine.kernels.triton_tiles import across

_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds to whole numbers
_TINY = tl.constexpr(1e-30)


@triton.jit
def _load_weight(  # noqa: PLR0917
    weight,
    first,
    n,
    k,
    chunk,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """[4 lanes, 8 rows, S, R, NB, 2 rows, 16]: one chunk for each of S warps."""
    R: tl.constexpr = C // 64
    u = tl.arange(0, 4)[:, None, None, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None, None, None]
    s = tl.arange(0, S)[None, None, :, None, None, None, None]
    r = tl.arange(0, R)[None, None, None, :, None, None, None]
    nb = tl.arange(0, NB)[None, None, None, None, :, None, None]
    h = tl.arange(0, 2)[None, None, None, None, None, :, None]
    e = tl.arange(0, 16)[None, None, None, None, None, None, :]
    row = tl.minimum(first + (nb * 2 + h) * 8 + g, n - 1).to(tl.int64)
    piece = (s * R + r) * 4 + u
    at = weight + (row * k + piece * 16 + e) + chunk * C
    if EXACT:
        w = tl.load(at, cache_modifier=".cg")
    else:
        w = tl.load(at, mask=piece * 16 + chunk * C < k, other=0.0, cache_modifier=".cg")
    return w


@triton.jit
def _load_x(  # noqa: PLR0917
    x,
    inputs,
    first,
    rows,
    k,
    chunk,
    S: tl.constexpr,
    C: tl.constexpr,
    MB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """[4 lanes, 8 tokens, S, R, MB, 16] times `inputs`, zero beyond the last token and column."""
    R: tl.constexpr = C // 64
    V: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # values of 16 bytes
    u = tl.arange(0, 4)[:, None, None, None, None, None, None]
    m = tl.arange(0, 8)[None, :, None, None, None, None, None]
    s = tl.arange(0, S)[None, None, :, None, None, None, None]
    r = tl.arange(0, R)[None, None, None, :, None, None, None]
    mb = tl.arange(0, MB)[None, None, None, None, :, None, None]
    h = tl.arange(0, 16 // V)[None, None, None, None, None, :, None]
    e = tl.arange(0, V)[None, None, None, None, None, None, :]
    row = first + mb * 8 + m
    column = ((s * R + r) * 4 + u) * 16 + h * V + e
    inside = ((s * R + r) * 4 + u) * 16 + chunk * C < k
    keep = row < rows if EXACT else (row < rows) & inside
    v = tl.load(x + (row.to(tl.int64) * k + column) + chunk * C, mask=keep, other=0.0)
    if inputs is not None:
        v = v.to(tl.float32) * tl.load(inputs + column + chunk * C, mask=inside, other=0.0)
    return v


@triton.jit
def _step_of(x, inputs, k, levels, WIDE: tl.constexpr):
    """Step and its inverse of one token; a step that is no number if any value is none."""
    at = tl.arange(0, WIDE)
    v = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
    if inputs is not None:
        v *= tl.load(inputs + at, mask=at < k, other=0.0)
    most = tl.max(tl.abs(v), 0)
    poison = tl.sum(v * 0.0, 0)
    return most / levels + poison, tl.where(most > _TINY, levels / most, 0.0)


@triton.jit(do_not_specialize=["rows", "n"])
def _thin(  # noqa: PLR0917
    x,
    inputs,
    steps,
    weight,
    scales,
    bias,
    out,
    rows,
    n,
    k,
    FLOAT: tl.constexpr,
    ROUND: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    MB: tl.constexpr,
    EXACT: tl.constexpr,
):
    R: tl.constexpr = C // 64
    LEVELS: tl.constexpr = 448.0 if FLOAT else 127.0
    first = tl.program_id(0) * (MB * 8)
    row0 = tl.program_id(1) * (NB * 16)
    step = 1.0
    inverse = 1.0
    if ROUND:
        step, inverse = _step_of(x, inputs, k, LEVELS, WIDE)
    acc = tl.zeros([S, NB * 16, MB * 8], tl.float32 if FLOAT else tl.int32)
    for chunk in range(0, tl.cdiv(k, C), S):
        w = _load_weight(weight, row0, n, k, chunk, S, C, NB, EXACT)
        v = _load_x(x, inputs, first, rows, k, chunk, S, C, MB, EXACT)
        if ROUND:
            v = v.to(tl.float32) * inverse
            if FLOAT:
                v = v.to(tl.float8e4nv)
            else:  # the low byte of the sum is the rounded value
                v = (v + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
        a = tl.permute(tl.reshape(w, [4, 8, S, R, NB, 2, 2, 2, 4]), 2, 4, 5, 1, 3, 6, 7, 0, 8)
        b = tl.permute(tl.reshape(v, [4, 8, S, R, MB, 2, 2, 4]), 2, 3, 5, 6, 0, 7, 4, 1)
        a = tl.reshape(a, [S, NB * 16, R * 64])
        b = tl.reshape(b, [S, R * 64, MB * 8])
        acc = tl.dot(a, b, acc) if FLOAT else tl.dot(a, b, acc, out_dtype=tl.int32)
    total = across(tl.reshape(acc, [S, NB * MB * 128]), S, NB * MB * 128).to(tl.float32)
    total = tl.reshape(total, [NB * 16, MB * 8])
    column = row0 + tl.arange(0, NB * 16)[:, None]
    row = first + tl.arange(0, MB * 8)[None, :]
    if not ROUND:
        step = tl.load(steps + row, mask=row < rows, other=0.0)
    total *= step
    total *= tl.load(scales + column, mask=column < n, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    place = out + row.to(tl.int64) * n + column
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < rows) & (column < n))


def product(
    x: Tensor,
    steps: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    *,
    inputs: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """[M, N] in `dtype`: codes x [M, K] with their `steps` float32 [M, 1] times the weight.

    Args:
        x: of the weight's dtype; without `steps` one token [1, K] of any float type, rounded here.
        weight: int8 or float8_e4m3fn [N, K], K a multiple of 16; `scales` float32 [N].
        inputs: float32 [K] multiplies x before it is rounded.
    """
    (rows, k), n = x.shape, weight.shape[0]
    out = torch.empty(rows, n, dtype=dtype, device=x.device)
    grid = (triton.cdiv(rows, 8 * tiling.tokens), triton.cdiv(n, 16 * tiling.blocks))
    _thin[grid](
        x,
        inputs if steps is None else None,
        steps,
        weight,
        scales,
        bias,
        out,
        rows,
        n,
        k,
        FLOAT=weight.dtype != torch.int8,
        ROUND=steps is None,
        WIDE=triton.next_power_of_2(k),
        S=tiling.warps,
        C=tiling.chunk,
        NB=tiling.blocks,
        MB=tiling.tokens,
        EXACT=not k % (tiling.chunk * tiling.warps),
        num_warps=tiling.warps,
        num_stages=1,
    )
    return out
