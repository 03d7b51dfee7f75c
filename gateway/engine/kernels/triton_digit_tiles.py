# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Tiles of packed codes and of a token's digits as operands of one int8 product: parts of a kernel.

As in `triton_tiles`, a warp takes pairs of blocks of the layout `vnni16` in 16-byte pieces that
are, after a renaming of registers, the left operand of a tensor-core product. Imported only where
Triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field(w, SHIFT: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    """int8 of the field at SHIFT of each byte; of a whole byte less 128."""
    if W == 8:
        if ASM:
            v = tl.inline_asm_elementwise(
                "xor.b32 $0, $1, 0x80808080;",
                "=r,r",
                [w],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            v = (w.to(tl.int32) ^ 128).to(tl.int8)
    elif ASM:
        MASK: tl.constexpr = (2**W - 1) * 0x1010101
        if SHIFT:
            v = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK}; }}",
                "=r,r",
                [w],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            v = tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {MASK};",
                "=r,r",
                [w],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
    else:
        v = ((w.to(tl.int32) >> SHIFT) & (2**W - 1)).to(tl.int8)
    return v


@triton.jit
def block(pair, b, HALF: tl.constexpr):
    """The block of 16 rows that is the b-th of a pair: neighbours, or half a head apart."""
    return (pair // HALF * 2 + b) * HALF + pair % HALF if HALF else pair * 2 + b


@triton.jit
def load_grid(  # noqa: PLR0917
    table,
    pair,
    blocks,
    groups,
    chunk,
    per_group,
    PER: tl.constexpr,
    S: tl.constexpr,
    NB: tl.constexpr,
    HALF: tl.constexpr,
):
    """`triton_tiles.load_grid` of whole chunks, for pairs of blocks."""
    u = tl.arange(0, 4)[:, None, None, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None, None, None]
    b = tl.arange(0, 2)[None, None, :, None, None, None]
    s = tl.arange(0, S)[None, None, None, :, None, None]
    nb = tl.arange(0, NB)[None, None, None, None, :, None]
    e = tl.arange(0, 4)[None, None, None, None, None, :]
    row = tl.minimum(block(pair + nb, b, HALF), blocks - 1).to(tl.int64) * (groups * 16)
    at = table + (row + q * 4 + e + u * 0 + s * 0)
    if PER > 0:
        at += tl.minimum((chunk + s) // PER, groups - 1) * 16
    elif PER == 0:
        at += tl.minimum((chunk + s) // per_group, groups - 1) * 16
    return tl.load(at)


@triton.jit
def load_codes(  # noqa: PLR0917
    plane,
    pair,
    blocks,
    chunk,
    chunks,
    W: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    EVEN: tl.constexpr,
    HALF: tl.constexpr,
):
    """uint8 [4 units, 4 quads, 2 blocks, S, R, NB, F, 16 bytes]: one chunk for each of S warps."""
    R: tl.constexpr = C // 32 if W >= 4 else C * W // 128
    F: tl.constexpr = 2 if W == 8 else 1
    u = tl.arange(0, 4)[:, None, None, None, None, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None, None, None, None, None]
    b = tl.arange(0, 2)[None, None, :, None, None, None, None, None]
    s = tl.arange(0, S)[None, None, None, :, None, None, None, None]
    r = tl.arange(0, R)[None, None, None, None, :, None, None, None]
    nb = tl.arange(0, NB)[None, None, None, None, None, :, None, None]
    f = tl.arange(0, F)[None, None, None, None, None, None, :, None]
    e = tl.arange(0, 16)[None, None, None, None, None, None, None, :]
    row = tl.minimum(block(pair + nb, b, HALF), blocks - 1).to(tl.int64) * (chunks * (C * W * 2))
    at = plane + (row + (((s * R + r) * 4 + u) * F + f) * 64 + q * 16 + e) + chunk * (C * W * 2)
    if EVEN:
        w = tl.load(at, cache_modifier=".cg")
    else:
        w = tl.load(at, mask=chunk + s < chunks, other=0, cache_modifier=".cg")
    return w


@triton.jit
def load_digits(  # noqa: PLR0917
    planes,
    k8,
    chunk,
    E: tl.constexpr,
    e: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    EVEN: tl.constexpr,
):
    """int8 [4 units, 8 columns of the product, S, R, 8]: digits in the even columns."""
    u = tl.arange(0, 4)[:, None, None, None, None]
    m = tl.arange(0, 8)[None, :, None, None, None]
    s = tl.arange(0, S)[None, None, :, None, None]
    r = tl.arange(0, R)[None, None, None, :, None]
    c = tl.arange(0, 8)[None, None, None, None, :]
    eighth = ((s * R + r) * 4 + u) * E + e
    keep = (m % 2 == 0) & (m < 6)
    if not EVEN:
        keep &= eighth + chunk * (R * E * 4) < k8
    at = planes + ((m // 2 * k8 + eighth) * 8 + c) + chunk * (R * E * 32)
    return tl.load(at, mask=keep, other=0)


@triton.jit
def load_scales(grid, chunk, chunks, PER: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr):  # noqa: PLR0917
    """Two float32 [S, 1, 1, 1, 2 blocks, 4 quads, 4 places]: what `Digits.grid` has for a chunk."""
    u = tl.arange(0, 4)[:, None, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None, None]
    b = tl.arange(0, 2)[None, None, :, None, None]
    s = tl.arange(0, S)[None, None, None, :, None]
    e = tl.arange(0, 2)[None, None, None, None, :]
    at = (chunk + s) // PER * 8 + u * 2 + e + q * 0 + b * 0
    return tl.load(
        grid + at, mask=None if EVEN else chunk + s < chunks, other=None if EVEN else 0.0
    )


@triton.jit
def placed(v, S: tl.constexpr):
    v = tl.permute(v, 3, 2, 1, 0)
    return tl.reshape(v, [S, 1, 1, 1, 2, 4, 4])


@triton.jit
def spread(v, S: tl.constexpr, NB: tl.constexpr):
    """`load_grid`'s answer for the rows of `_sums`."""
    v = tl.permute(tl.reshape(v, [4, 4, 2, S, NB, 2, 2]), 3, 4, 5, 6, 2, 1, 0)
    return v.to(tl.float32)
