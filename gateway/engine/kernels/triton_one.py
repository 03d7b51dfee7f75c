# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""One token times packed integer codes on CUDA, in integers: the layout `vnni16` as stored.

A Triton kernel. Codes and the token's digits (`triton_digits`) are operands of one int8 product of
the tensor cores, the digits three of its eight columns, so that nothing is converted and little
computed while weights stream in. The warps of a program share out the columns and are added up in
a fixed order. Imported only where Triton is.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from gateway.engine.kernels.codes import Codes, DigitTiling
from gateway.engine.kernels.triton_digit_tiles import (
    block,
    field,
    load_codes,
    load_digits,
    load_grid,
    load_scales,
    placed,
    spread,
)
from gateway.engine.kernels.triton_digits import Digits, Heads
from gateway.engine.kernels.triton_tiles import across

_ASM = os.environ.get("TRITON_INTERPRET", "0") != "1"  # the interpreter knows no assembly


@triton.jit
def _sums(  # noqa: PLR0917
    w,
    planes,
    k8,
    chunk,
    W: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """int32 [S, NB, 2, 2, 2, 4, 4 places]: a plane's fields times digits."""
    E: tl.constexpr = 1 if W >= 4 else 4 // W
    R: tl.constexpr = C // (32 * E)
    acc = tl.zeros([S, NB * 32, 8], tl.int32)
    for e in tl.static_range(E):
        v = load_digits(planes, k8, chunk, E, e, S, R, EVEN)
        v = tl.reshape(v, [4, 8, S, R, 2, 4])  # u m s r h j
        if W == 8:  # u q b s r nb h t rh j
            left = tl.reshape(field(w, 0, W, ASM), [4, 4, 2, S, R, NB, 2, 2, 2, 4])
            left = tl.permute(left, 3, 5, 7, 8, 2, 1, 4, 6, 0, 9)
            right = tl.permute(v, 2, 3, 4, 0, 5, 1)
        else:  # u q b s r nb t rh j h; joined, so that a lane has eight columns, not twice four
            low, high = field(w, 2 * e * W, W, ASM), field(w, (2 * e + 1) * W, W, ASM)
            left = tl.reshape(tl.join(low, high), [4, 4, 2, S, R, NB, 2, 2, 4, 2])
            left = tl.permute(left, 3, 5, 6, 7, 2, 1, 4, 0, 9, 8)
            right = tl.permute(v, 2, 3, 0, 4, 5, 1)
        right = tl.reshape(right, [S, R * 32, 8])
        acc = tl.dot(tl.reshape(left, [S, NB * 32, R * 32]), right, acc, out_dtype=tl.int32)
    even, _ = tl.split(tl.reshape(acc, [S, NB, 2, 2, 2, 4, 4, 2]))
    return even


@triton.jit
def _over(v, S: tl.constexpr, N: tl.constexpr):
    """[N]: the sum of v [S, N]; as `across`, for more."""
    if S == 32:
        a, b = tl.split(tl.reshape(tl.permute(v, 1, 0), [N, 16, 2]))
        v = tl.permute(a + b, 1, 0)
    return across(v, 16 if S == 32 else S, N)


@triton.jit
def _chunk(  # noqa: PLR0917
    w0,
    w1,
    w2,
    steps,
    points,
    digits,
    digit_grid,
    k8,
    chunk,
    chunks,
    offset,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    ZERO: tl.constexpr,
    ZEROS: tl.constexpr,
    CENTRED: tl.constexpr,
    PER: tl.constexpr,
    DIGIT_PER: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """float32 [S, NB, 2, 2, 2, 4, 4 places]: the products of a chunk."""
    found = _sums(w0, digits, k8, chunk, W0, S, C, NB, EVEN, ASM)
    if W1:
        found = found * F0 + _sums(w1, digits, k8, chunk, W1, S, C, NB, EVEN, ASM) * F1
    if W2:
        found += _sums(w2, digits, k8, chunk, W2, S, C, NB, EVEN, ASM)
    size, summed = tl.split(load_scales(digit_grid, chunk, chunks, DIGIT_PER, S, EVEN))
    value = found.to(tl.float32) * placed(size, S)
    if ZEROS:
        value -= (spread(points, S, NB) * ZERO + offset) * placed(summed, S)
    elif not CENTRED:
        value -= offset * placed(summed, S)
    if PER >= 0:
        value *= spread(steps, S, NB)
    return value


@triton.jit
def _store_heads(  # noqa: PLR0917
    sums,
    pair,
    out,
    turns,
    write,
    keys,
    values,
    NB: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    """Turn the heads of queries and keys; queries to `out`, keys and values to the pool."""
    low, high = tl.split(tl.permute(sums, 0, 1, 2, 4, 3))  # [NB, 2, 2, 4] each
    nb = tl.arange(0, NB)[:, None, None, None]
    t = tl.arange(0, 2)[None, :, None, None]
    rh = tl.arange(0, 2)[None, None, :, None]
    q = tl.arange(0, 4)[None, None, None, :]
    DIM: tl.constexpr = 32 * HALF
    head = (pair + nb) // HALF + (t + rh + q) * 0
    c = (pair + nb) % HALF * 16 + q * 4 + t * 2 + rh
    turned = head < HEADS + KV_HEADS
    cos = tl.load(turns + c, mask=turned, other=1.0)
    sin = tl.load(turns + DIM + DIM // 2 + c, mask=turned, other=0.0)
    first = (low * cos - high * sin).to(out.dtype.element_ty)
    second = (high * cos + low * sin).to(out.dtype.element_ty)
    query = out + head * DIM + c
    tl.store(query, first, mask=head < HEADS)
    tl.store(query + DIM // 2, second, mask=head < HEADS)
    slot = tl.load(write).to(tl.int64) * (KV_HEADS * DIM)
    key = keys + slot + (head - HEADS) * DIM + c
    mine = turned & (head >= HEADS)
    tl.store(key, first, mask=mine)
    tl.store(key + DIM // 2, second, mask=mine)
    value = values + slot + (head - HEADS - KV_HEADS) * DIM + c
    mine = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    tl.store(value, first, mask=mine)
    tl.store(value + DIM // 2, second, mask=mine)


@triton.jit(do_not_specialize=["n", "k8", "blocks", "groups", "chunks", "per_group"])
def _product(  # noqa: PLR0912, PLR0917
    digits,
    digit_grid,
    plane0,
    plane1,
    plane2,
    scales,
    zeros,
    bias,
    out,
    turns,
    write,
    keys,
    values,
    n,
    k8,
    blocks,
    groups,
    chunks,
    per_group,
    scale,
    offset,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    ZERO: tl.constexpr,
    CENTRED: tl.constexpr,
    PER: tl.constexpr,
    DIGIT_PER: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    EVEN: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    pair = tl.program_id(0) * NB
    ZEROS: tl.constexpr = zeros is not None
    w0 = load_codes(plane0, pair, blocks, 0, chunks, W0, S, C, NB, EVEN, HALF)
    w1 = w0
    w2 = w0
    if W1:
        w1 = load_codes(plane1, pair, blocks, 0, chunks, W1, S, C, NB, EVEN, HALF)
    if W2:
        w2 = load_codes(plane2, pair, blocks, 0, chunks, W2, S, C, NB, EVEN, HALF)
    steps = load_grid(scales, pair, blocks, groups, 0, per_group, PER, S, NB, HALF)
    points = steps
    if ZEROS:
        points = load_grid(zeros, pair, blocks, groups, 0, per_group, PER, S, NB, HALF)
    if EARLY:  # weights do not depend on the kernel before
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    total = _chunk(
        w0, w1, w2, steps, points, digits, digit_grid, k8, 0, chunks, offset,
        W0, W1, W2, F0, F1, ZERO, ZEROS, CENTRED, PER, DIGIT_PER, S, C, NB, EVEN, ASM,
    )  # fmt: skip
    for chunk in range(S, chunks, S):
        w0 = load_codes(plane0, pair, blocks, chunk, chunks, W0, S, C, NB, EVEN, HALF)
        w1 = w0
        w2 = w0
        if W1:
            w1 = load_codes(plane1, pair, blocks, chunk, chunks, W1, S, C, NB, EVEN, HALF)
        if W2:
            w2 = load_codes(plane2, pair, blocks, chunk, chunks, W2, S, C, NB, EVEN, HALF)
        now = steps
        middle = points
        if PER >= 0:
            now = load_grid(scales, pair, blocks, groups, chunk, per_group, PER, S, NB, HALF)
            if ZEROS:
                middle = load_grid(zeros, pair, blocks, groups, chunk, per_group, PER, S, NB, HALF)
        total += _chunk(
            w0, w1, w2, now, middle, digits, digit_grid, k8, chunk, chunks, offset,
            W0, W1, W2, F0, F1, ZERO, ZEROS, CENTRED, PER, DIGIT_PER, S, C, NB, EVEN, ASM,
        )  # fmt: skip
    if PER < 0:
        total *= spread(steps, S, NB)
    sums = tl.sum(tl.reshape(total, [S, NB * 32, 4]), 2)
    sums = _over(sums, S, NB * 32) * scale
    sums = tl.reshape(sums, [NB, 2, 2, 2, 4])
    nb = tl.arange(0, NB)[:, None, None, None, None]
    t = tl.arange(0, 2)[None, :, None, None, None]
    rh = tl.arange(0, 2)[None, None, :, None, None]
    b = tl.arange(0, 2)[None, None, None, :, None]
    q = tl.arange(0, 4)[None, None, None, None, :]
    column = block(pair + nb, b, HALF) * 16 + q * 4 + t * 2 + rh
    if bias is not None:
        sums += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    if HALF:
        _store_heads(sums, pair, out, turns, write, keys, values, NB, HALF, HEADS, KV_HEADS)
    else:
        tl.store(out + column, sums.to(out.dtype.element_ty), mask=column < n)


def product(
    digits: Digits,
    codes: Codes,
    bias: Tensor | None,
    tiling: DigitTiling,
    *,
    heads: Heads | None = None,
    early: bool = False,
) -> Tensor:
    """The token times a weight with a `digit_group`, plus the bias.

    bf16 [1, N]; with `heads`, turned queries bf16 [1, heads · dim]; keys and values are in the pool
    then.
    """
    blocks, groups, _ = codes.scales.shape
    n = codes.n if heads is None else heads.heads * heads.dim
    out = torch.empty(1, n, dtype=torch.bfloat16, device=codes.scales.device)
    planes = codes.planes
    widths = codes.widths + (0,) * (3 - len(planes))
    factors = codes.factors + (1,) * (3 - len(planes))
    # A whole byte is taken less 128.
    pairs = zip(codes.widths, codes.factors, strict=True)
    offset = codes.offset - sum(128.0 * factor for width, factor in pairs if width == 8)
    chunks = codes.k // tiling.chunk
    per_group = codes.width // tiling.chunk
    at_once = tiling.warps * tiling.pieces
    _product[(triton.cdiv(blocks, 2 * tiling.blocks),)](
        *digits,
        planes[0],
        planes[min(1, len(planes) - 1)],
        planes[-1],
        codes.scales,
        codes.zeros,
        bias,
        out,
        *((out,) * 4 if heads is None else heads[:4]),
        codes.n,
        codes.k // 8,
        blocks,
        groups,
        chunks,
        per_group,
        codes.scale,
        offset,
        *widths,
        *factors[:2],
        ZERO=codes.zero_factor,
        CENTRED=offset == 0.0,
        PER=-1 if groups == 1 else per_group if per_group in (1, 2, 4, 8) else 0,
        DIGIT_PER=codes.k // digits.grid.shape[0] // tiling.chunk,
        S=at_once,
        C=tiling.chunk,
        NB=tiling.blocks,
        EVEN=not chunks % at_once,
        HALF=0 if heads is None else heads.dim // 32,
        HEADS=0 if heads is None else heads.heads,
        KV_HEADS=0 if heads is None else heads.kv_heads,
        ASM=_ASM,
        EARLY=early,
        num_warps=tiling.warps,
        num_stages=1,
        launch_pdl=early,
    )
    return out
