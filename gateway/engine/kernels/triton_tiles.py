# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Tiles of packed codes and of activations as operands of tensor cores: parts of Triton kernels.

A warp takes 32 rows (two blocks of the layout `vnni16`) and a run of columns, read in 16-byte
pieces that are, after a renaming of registers, the left operand of a tensor-core product: the order
of the dimensions decides which lane holds what, and no value moves through shared memory. Imported
only where Triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fields(w, SHIFT: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr):
    """bf16 [..., 2, 2]: 128 + the field at SHIFT of each of the four bytes of 32-bit words."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; shr.u32 t, $4, $5; and.b32 t, t, $6;"
            " prmt.b32 u, t, 0x43434343, 0x4140; mov.b32 {$0, $1}, u;"
            " prmt.b32 u, t, 0x43434343, 0x4342; mov.b32 {$2, $3}, u; }",
            "=h,=h,=h,=h,r,r,r",
            [w, SHIFT, MASK * 0x1010101],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        a = ((w >> SHIFT) & MASK | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        b = ((w >> (SHIFT + 8)) & MASK | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        c = ((w >> (SHIFT + 16)) & MASK | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        d = ((w >> (SHIFT + 24)) & MASK | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def load_words(  # noqa: PLR0917
    plane,
    block,
    blocks,
    chunk,
    chunks,
    W: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    EVEN: tl.constexpr,
):
    """int32 [4 units, 4 quads, 2 blocks, S, R, NB, F, 4 rows]: one chunk for each of S warps."""
    R: tl.constexpr = C // 32 if W >= 4 else C * W // 128
    F: tl.constexpr = 2 if W == 8 else 1
    u = tl.arange(0, 4)[:, None, None, None, None, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None, None, None, None, None]
    b = tl.arange(0, 2)[None, None, :, None, None, None, None, None]
    s = tl.arange(0, S)[None, None, None, :, None, None, None, None]
    r = tl.arange(0, R)[None, None, None, None, :, None, None, None]
    nb = tl.arange(0, NB)[None, None, None, None, None, :, None, None]
    f = tl.arange(0, F)[None, None, None, None, None, None, :, None]
    e = tl.arange(0, 4)[None, None, None, None, None, None, None, :]
    row = tl.minimum(block + nb * 2 + b, blocks - 1).to(tl.int64) * (chunks * (C * W // 2))
    at = plane + (row + (((s * R + r) * 4 + u) * F + f) * 16 + q * 4 + e) + chunk * (C * W // 2)
    if EVEN:
        w = tl.load(at, cache_modifier=".cg")
    else:
        w = tl.load(at, mask=chunk + s < chunks, other=0, cache_modifier=".cg")
    return w


@triton.jit
def load_grid(  # noqa: PLR0917
    table,
    block,
    blocks,
    groups,
    chunk,
    per_group,
    PER: tl.constexpr,
    S: tl.constexpr,
    NB: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[4 (the same), 4 quads, 2 blocks, S, NB, 4 rows] of [blocks, G, 16]: each warp's group."""
    u = tl.arange(0, 4)[:, None, None, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None, None, None]
    b = tl.arange(0, 2)[None, None, :, None, None, None]
    s = tl.arange(0, S)[None, None, None, :, None, None]
    nb = tl.arange(0, NB)[None, None, None, None, :, None]
    e = tl.arange(0, 4)[None, None, None, None, None, :]
    row = tl.minimum(block + nb * 2 + b, blocks - 1).to(tl.int64) * (groups * 16)
    at = table + (row + q * 4 + e + u * 0 + s * 0)
    if PER > 0 and EVEN:
        at += (chunk + s) // PER * 16
    elif PER >= 0:
        at += tl.minimum((chunk + s) // per_group, groups - 1) * 16
    return tl.load(at)


@triton.jit
def spread(v, S: tl.constexpr, NB: tl.constexpr):
    """`load_grid`'s answer as a factor of `fields_product`'s."""
    v = tl.permute(tl.reshape(v, [4, 4, 2, S, NB, 2, 2]), 3, 4, 5, 6, 2, 1, 0)
    return tl.reshape(v, [S, NB, 2, 2, 2, 4, 1, 4, 1])


@triton.jit
def load_x(  # noqa: PLR0917
    x,
    first,
    rows,
    k8,
    chunk,
    E: tl.constexpr,
    e: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Pairs of bf16 in int32 [4 units, 8 tokens, S, R, MB, 4]; rows beyond the last are zero."""
    u = tl.arange(0, 4)[:, None, None, None, None, None]
    m = tl.arange(0, 8)[None, :, None, None, None, None]
    s = tl.arange(0, S)[None, None, :, None, None, None]
    r = tl.arange(0, R)[None, None, None, :, None, None]
    mb = tl.arange(0, MB)[None, None, None, None, :, None]
    c = tl.arange(0, 4)[None, None, None, None, None, :]
    row = first + mb * 8 + m
    eighth = ((s * R + r) * 4 + u) * E + e
    at = x + (row.to(tl.int64) * (k8 * 4) + eighth * 4 + c) + chunk * (R * E * 16)
    if EXACT:
        v = tl.load(at, mask=row < rows, other=0)
    else:
        keep = (row < rows) & (eighth + chunk * (R * E * 4) < k8)
        v = tl.load(at, mask=keep, other=0)
    return v


@triton.jit
def _right(v, S: tl.constexpr, R: tl.constexpr, MB: tl.constexpr, ASM: tl.constexpr):
    """Right operand bf16 [S, 32 R, 8 MB] of `load_x`'s words, columns in `_left`'s order."""
    if ASM:
        a, b = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [v],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        a = v.to(tl.int16).to(tl.bfloat16, bitcast=True)
        b = (v >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    v = tl.reshape(tl.join(a, b), [4, 8, S, R, MB, 2, 2, 2])  # u m s r mb f h p
    return tl.reshape(tl.permute(v, 2, 3, 6, 0, 5, 7, 4, 1), [S, R * 32, MB * 8])


@triton.jit
def _left(  # noqa: PLR0917
    w,
    SHIFT: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    NB: tl.constexpr,
    ASM: tl.constexpr,
):
    """Left operand bf16 [S, 32 NB, 32 R] of the fields at SHIFT: 128 + field."""
    MASK: tl.constexpr = 15 if W >= 4 else 2**W - 1
    v = _fields(w, SHIFT, MASK, ASM)
    if W == 8:  # u q b s r nb f t rh h p
        v = tl.reshape(v, [4, 4, 2, S, R, NB, 2, 2, 2, 2, 2])
        v = tl.permute(v, 3, 5, 7, 8, 2, 1, 4, 9, 0, 6, 10)
    else:  # u q b s r nb t rh h p f
        v = tl.join(v, _fields(w, SHIFT + W, MASK, ASM))
        v = tl.reshape(v, [4, 4, 2, S, R, NB, 2, 2, 2, 2, 2])
        v = tl.permute(v, 3, 5, 6, 7, 2, 1, 4, 8, 0, 10, 9)
    return tl.reshape(v, [S, NB * 32, R * 32])


@triton.jit
def _dot(a, b, acc, ASM: tl.constexpr):
    """The interpreter multiplies no bf16."""
    return tl.dot(a, b, acc) if ASM else tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def fields_product(  # noqa: PLR0917
    w,
    v,
    x,
    first,
    rows,
    k8,
    chunk,
    W: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    NB: tl.constexpr,
    MB: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """float32 [S, NB, 2, 2, 2, 4, MB, 4, 2]: a plane's fields, each 128 too large, times x; and the
    sums of x in the same shape."""
    E: tl.constexpr = 1 if W >= 4 else 4 // W
    R: tl.constexpr = C // (32 * E)
    low = tl.zeros([S, NB * 32, MB * 8], tl.float32)
    high = tl.zeros([S, NB * 32, MB * 8], tl.float32)
    sums = tl.zeros([S, 16, MB * 8], tl.float32)
    # Through a join, as the other left operand: both products then read x in the same order.
    half = tl.full([S, 16, R * 16], 1.0, tl.float32).to(tl.bfloat16)
    ones = tl.reshape(tl.join(half, half), [S, 16, R * 32])
    for e in tl.static_range(E):
        if E > 1 or not AHEAD:
            v = load_x(x, first, rows, k8, chunk, E, e, S, R, MB, EXACT)
        right = _right(v, S, R, MB, ASM)
        low = _dot(_left(w, 2 * e * W, W, S, R, NB, ASM), right, low, ASM)
        if W == 8:
            high = _dot(_left(w, 4, W, S, R, NB, ASM), right, high, ASM)
        sums = _dot(ones, right, sums, ASM)
    if W == 8:
        low += 16.0 * high
    sums = tl.reshape(sums, [S, 1, 1, 2, 2, 4, MB, 4, 2])
    return tl.reshape(low, [S, NB, 2, 2, 2, 4, MB, 4, 2]), sums


@triton.jit
def across(v, S: tl.constexpr, N: tl.constexpr):
    """[N]: the sum of v [S, N] over S warps in a fixed order. By halves: a reduction's way through
    shared memory meets bank conflicts."""
    v = tl.permute(v, 1, 0)
    if S >= 2:
        a, b = tl.split(tl.reshape(v, [N, S // 2, 2]))
        v = a + b
    if S >= 4:
        a, b = tl.split(tl.reshape(v, [N, S // 4, 2]))
        v = a + b
    if S >= 8:
        a, b = tl.split(tl.reshape(v, [N, S // 8, 2]))
        v = a + b
    if S >= 16:
        a, b = tl.split(tl.reshape(v, [N, S // 16, 2]))
        v = a + b
    return tl.reshape(v, [N])
