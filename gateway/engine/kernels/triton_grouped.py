# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Products of a few tokens with packed integer codes on CUDA, from the layout `vnni16` as stored.

A Triton kernel. Codes become bf16 by bit operations (128 + code, exact); what the 128 and the zero
point add is taken off by a product with ones. The warps of a program share out the columns and are
added up in a fixed order, so results do not vary. Imported only where Triton is.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from gateway.engine.kernels.codes import Codes, Tiling
from gateway.engine.kernels.triton_tiles import (
    across,
    fields_product,
    load_grid,
    load_words,
    load_x,
    spread,
)

_ASM = os.environ.get("TRITON_INTERPRET", "0") != "1"  # the interpreter knows no assembly


@triton.jit(do_not_specialize=["rows", "n", "k8", "blocks", "groups", "chunks", "per_group"])
def _thin(  # noqa: PLR0912, PLR0915, PLR0917
    x,
    plane0,
    plane1,
    plane2,
    scales,
    zeros,
    bias,
    out,
    rows,
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
    PER: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    MB: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    first = tl.program_id(0) * (MB * 8)
    block = tl.program_id(1) * (NB * 2)
    acc = tl.zeros([S, NB, 2, 2, 2, 4, MB, 4, 2], tl.float32)
    next0 = load_words(plane0, block, blocks, 0, chunks, W0, S, C, NB, EVEN)
    next1 = next0
    next2 = next0
    if W1:
        next1 = load_words(plane1, block, blocks, 0, chunks, W1, S, C, NB, EVEN)
    if W2:
        next2 = load_words(plane2, block, blocks, 0, chunks, W2, S, C, NB, EVEN)
    next_scales = load_grid(scales, block, blocks, groups, 0, per_group, PER, S, NB, EVEN)
    next_zeros = next_scales
    if zeros is not None:
        next_zeros = load_grid(zeros, block, blocks, groups, 0, per_group, PER, S, NB, EVEN)
    if EARLY:  # weights do not depend on the kernel before
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    next_x = 0
    if AHEAD:
        next_x = load_x(x, first, rows, k8, 0, 1, 0, S, C // 32, MB, EXACT)
    for chunk in range(0, chunks, S):
        if AHEAD:
            w0, w1, w2, steps, points = next0, next1, next2, next_scales, next_zeros
            v = next_x
            load = chunk + S
        else:
            v = 0
            load = chunk
        if not AHEAD or chunk + S < chunks:  # on their way while this chunk is computed
            next0 = load_words(plane0, block, blocks, load, chunks, W0, S, C, NB, EVEN)
            if W1:
                next1 = load_words(plane1, block, blocks, load, chunks, W1, S, C, NB, EVEN)
            if W2:
                next2 = load_words(plane2, block, blocks, load, chunks, W2, S, C, NB, EVEN)
            next_scales = load_grid(
                scales, block, blocks, groups, load, per_group, PER, S, NB, EVEN
            )
            if AHEAD:
                next_x = load_x(x, first, rows, k8, load, 1, 0, S, C // 32, MB, EXACT)
            if zeros is not None:
                next_zeros = load_grid(
                    zeros, block, blocks, groups, load, per_group, PER, S, NB, EVEN
                )
        if not AHEAD:
            w0, w1, w2, steps, points = next0, next1, next2, next_scales, next_zeros
        total, sums = fields_product(
            w0, v, x, first, rows, k8, chunk, W0, S, C, NB, MB, EXACT, ASM, AHEAD
        )
        if W1:
            more, _ = fields_product(
                w1, v, x, first, rows, k8, chunk, W1, S, C, NB, MB, EXACT, ASM, AHEAD
            )
            total = total * F0 + more * F1
        if W2:
            more, _ = fields_product(
                w2, v, x, first, rows, k8, chunk, W2, S, C, NB, MB, EXACT, ASM, AHEAD
            )
            total += more
        if zeros is not None:
            total -= (spread(points, S, NB).to(tl.float32) * ZERO + offset) * sums
        else:
            total -= offset * sums
        acc += spread(steps, S, NB).to(tl.float32) * total
    total = across(tl.reshape(acc, [S, NB * MB * 256]), S, NB * MB * 256) * scale
    total = tl.reshape(total, [NB, 2, 2, 2, 4, MB, 4, 2])
    nb = tl.arange(0, NB)[:, None, None, None, None, None, None, None]
    t = tl.arange(0, 2)[None, :, None, None, None, None, None, None]
    rh = tl.arange(0, 2)[None, None, :, None, None, None, None, None]
    b = tl.arange(0, 2)[None, None, None, :, None, None, None, None]
    q = tl.arange(0, 4)[None, None, None, None, :, None, None, None]
    mb = tl.arange(0, MB)[None, None, None, None, None, :, None, None]
    u = tl.arange(0, 4)[None, None, None, None, None, None, :, None]
    e = tl.arange(0, 2)[None, None, None, None, None, None, None, :]
    row = first + mb * 8 + u * 2 + e
    column = (block + nb * 2 + b) * 16 + q * 4 + t * 2 + rh
    if bias is not None:
        total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    place = out + row.to(tl.int64) * n + column
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < rows) & (column < n))


def _known(groups: int, chunks: int) -> int:
    """Chunks of a group where that saves a division: small powers of two; -1 for a single group, 0
    for all others."""
    if groups == 1:
        return -1
    return chunks if chunks in (1, 2, 4, 8) else 0


def product(
    x: Tensor, codes: Codes, bias: Tensor | None, tiling: Tiling, *, early: bool = False
) -> Tensor:
    """bf16 [M, N]: x bf16 [M, K] (contiguous) times the weight, plus the bias.

    K must be a multiple of 8, the width of a group one of the chunk, and a chunk's columns a whole
    number of 32 · 4 / bits of every plane (`fits`).
    """
    rows, blocks = x.shape[0], codes.scales.shape[0]
    out = torch.empty(rows, codes.n, dtype=x.dtype, device=x.device)
    planes = [plane.view(torch.int32) for plane in codes.planes]
    widths = codes.widths + (0,) * (3 - len(planes))
    factors = codes.factors + (1,) * (3 - len(planes))
    # Every field of every plane is 128 too large; an 8-bit code is two fields.
    excess = sum(
        128.0 * factor * (17 if width == 8 else 1)
        for width, factor in zip(codes.widths, codes.factors, strict=True)
    )
    chunk = tiling.chunk
    chunks = codes.scales.shape[1] * codes.width // chunk
    grid = (triton.cdiv(rows, 8 * tiling.tokens), triton.cdiv(blocks, 2 * tiling.blocks))
    _thin[grid](
        x.view(torch.int32),
        planes[0],
        planes[min(1, len(planes) - 1)],
        planes[-1],
        codes.scales,
        codes.zeros,
        bias,
        out,
        rows,
        codes.n,
        codes.k // 8,
        blocks,
        codes.scales.shape[1],
        chunks,
        codes.width // chunk,
        codes.scale,
        excess + codes.offset,
        *widths,
        *factors[:2],
        ZERO=codes.zero_factor,
        PER=_known(codes.scales.shape[1], codes.width // chunk),
        EVEN=not chunks % tiling.warps,
        EXACT=not chunks % tiling.warps and chunks * chunk == codes.k,
        S=tiling.warps,
        C=chunk,
        NB=tiling.blocks,
        MB=tiling.tokens,
        ASM=_ASM,
        AHEAD=tiling.ahead,
        EARLY=early,
        num_warps=tiling.warps,
        num_stages=1,
        launch_pdl=early,
    )
    return out
