# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: PLR0915, PLR0917 (a kernel has one parameter per tensor and size)
"""Attention over the paged pool in Triton: one token per sequence, or packed chunks of prompts.

Both read keys and values where they lie, through block tables on the device, and only the blocks
that hold something a query may see. Decoding splits each context over several programs and puts
their parts together in the last one to finish (flash-decoding: Dao et al., 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html); the query heads that share a KV head are
rows of one product, so that a key is read once. Softmax and sums are in fp32.

Lengths and tables are read from the device: a captured launch serves any context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.cuda.launch import await_inputs, early

LOG2E = 1.4426950408889634
MIN_DOT = 16  # rows and columns of the tensor cores' smallest product
_TILE = 64  # keys at once
QUERIES = 64  # rows of a prompt at once
_PROGRAMS = 264  # twice an H100's or H200's multiprocessors
_MOST_SPLITS = 32


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the programs of one decode launch leave their parts; shared by all layers of a step.

    Attributes:
        splits: most programs of one row and KV head.
        parts: fp32 [splits, rows, heads, dim]; sums of values, not yet divided.
        stats: fp32 [splits, rows, heads, 2]; largest score and sum of weights.
        arrived: int32 [rows, kv_heads]; zero between launches.
    """

    splits: int
    parts: Tensor
    stats: Tensor
    arrived: Tensor


def make_scratch(rows: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> Scratch:
    """Scratch of as many splits as fill the device with `rows` sequences."""
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // (rows * kv_heads)))

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Scratch(
        splits,
        make(splits, rows, heads, dim),
        make(splits, rows, heads, 2),
        make(rows, kv_heads, dtype=torch.int32),
    )


@triton.jit
def _scores(q, key_ptr, slot, at, some, live, KV_ROW: tl.constexpr):
    """q [rows, dim] · the keys in the pool's slots → [rows, keys], for exp2."""
    key = tl.load(
        key_ptr + slot[None, :] * KV_ROW + at[:, None], some[:, None] & live[None, :], other=0.0
    )
    return tl.dot(q, key, input_precision="ieee")


@triton.jit
def _fold(scores, seen, high, total, acc, value_ptr, slot, at, some, live, KV_ROW: tl.constexpr):
    """One tile of keys into the running softmax."""
    value = tl.load(
        value_ptr + slot[:, None] * KV_ROW + at[None, :], live[:, None] & some[None, :], other=0.0
    )
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(high, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see nothing of this tile
    weight = tl.exp2(scores - base[:, None])
    fade = tl.exp2(high - base)
    acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return higher, total * fade + tl.sum(weight, 1), acc


@triton.jit
def together(
    parts_ptr,
    stats_ptr,
    used,
    row,
    rows,
    head,
    heads_in,
    at,
    some,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The parts of a row's heads from `used` splits as one; read past the first-level cache."""
    high = tl.full(head.shape, float("-inf"), tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    acc = tl.zeros([head.shape[0], at.shape[0]], tl.float32)
    for first in range(0, used, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        part = (split[:, None] * rows + row).to(tl.int64) * HEADS + head[None, :]
        live = (split < used)[:, None] & heads_in[None, :]
        m = tl.load(stats_ptr + part * 2, live, other=float("-inf"), cache_modifier=".cg")
        w = tl.load(stats_ptr + part * 2 + 1, live, other=0.0, cache_modifier=".cg")
        place = part[:, :, None] * DIM + at[None, None, :]
        mask = live[:, :, None] & some[None, None, :]
        a = tl.load(parts_ptr + place, mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(high, tl.max(m, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # heads that only fill up the tile
        fade, weight = tl.exp2(high - base), tl.exp2(m - base[None, :])
        acc = acc * fade[:, None] + tl.sum(a * weight[:, :, None], 0)
        total = total * fade + tl.sum(w * weight, 0)
        high = higher
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _decode(
    query_ptr,
    positions_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    width_ptr,
    parts_ptr,
    stats_ptr,
    arrived_ptr,
    out_ptr,
    scale,
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs [row, kv head, split]."""
    row = tl.program_id(0)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    shared: tl.constexpr = HEADS // KV_HEADS
    kv_row: tl.constexpr = KV_HEADS * DIM
    length = tl.load(positions_ptr + row).to(tl.int32) + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    start = first // TILE
    tiles = tl.cdiv(length, TILE) - start
    each = tl.cdiv(tiles, tl.num_programs(2))
    used = tl.cdiv(tiles, each)
    await_inputs(EARLY)
    if split < used:
        base = kv * DIM
        table = tables_ptr + row.to(tl.int64) * tl.load(width_ptr)
        h = tl.arange(0, BLOCK_H)
        at = tl.arange(0, BLOCK_D)
        some = at < DIM
        inside = (h < shared)[:, None] & some[None, :]
        head = kv * shared + h
        place = head[:, None] * DIM + at[None, :]
        q = tl.load(query_ptr + row.to(tl.int64) * Q_STRIDE + place, inside, other=0.0)
        high = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        begin = start + split * each
        for tile in range(begin, tl.minimum(begin + each, start + tiles)):
            n = tile * TILE + tl.arange(0, TILE)
            live = (n < length) & (n >= first)
            slot = tl.load(table + n // SIZE, live, other=0).to(tl.int64) * SIZE + n % SIZE
            s = _scores(q, keys_ptr + base, slot, at, some, live, kv_row) * scale
            high, total, acc = _fold(
                s, live[None, :], high, total, acc, values_ptr + base, slot, at, some, live, kv_row
            )
        target = out_ptr + row.to(tl.int64) * (HEADS * DIM)
        if used == 1:
            tl.store(target + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), inside)
        else:
            part = (split * tl.num_programs(0) + row).to(tl.int64) * HEADS + head
            tl.store(parts_ptr + part[:, None] * DIM + at[None, :], acc, inside)
            tl.store(stats_ptr + part * 2, high, h < shared)
            tl.store(stats_ptr + part * 2 + 1, total, h < shared)
            tl.debug_barrier()
            if tl.atomic_add(arrived_ptr + row * KV_HEADS + kv, 1, sem="acq_rel") == used - 1:
                tl.debug_barrier()
                own = tl.arange(0, SHARED)
                found = together(
                    parts_ptr,
                    stats_ptr,
                    used,
                    row,
                    tl.num_programs(0),
                    kv * shared + own,
                    own < shared,
                    at,
                    some,
                    DIM,
                    HEADS,
                    8,
                )
                to = target + (kv * shared + own)[:, None] * DIM + at[None, :]
                within = (own < shared)[:, None] & some[None, :]
                tl.store(to, found.to(out_ptr.dtype.element_ty), within)
                tl.store(arrived_ptr + row * KV_HEADS + kv, 0)


@triton.jit
def _prefill(
    query_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    width_ptr,
    tiles_ptr,
    out_ptr,
    scale,
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs [tile of queries, head]; `tiles` [n, 4]: first row, rows, position, table."""
    await_inputs(EARLY)
    tile_at = tiles_ptr + tl.program_id(0) * 4
    head = tl.program_id(1)
    kv_row: tl.constexpr = KV_HEADS * DIM
    base = head // (HEADS // KV_HEADS) * DIM
    row = tl.load(tile_at)
    count = tl.load(tile_at + 1)
    position = tl.load(tile_at + 2)
    table = tables_ptr + tl.load(tile_at + 3).to(tl.int64) * tl.load(width_ptr)
    m = tl.arange(0, BLOCK_M)
    at = tl.arange(0, BLOCK_D)
    some = at < DIM
    inside = (m < count)[:, None] & some[None, :]
    place = (row + m).to(tl.int64)[:, None]
    q = tl.load(query_ptr + place * Q_STRIDE + head * DIM + at[None, :], inside, other=0.0)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    length = position + count
    first = 0
    # Tiles below `plain` are seen whole by every query.
    plain = (position + 1) // TILE
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // TILE
        plain = first
    for tile in range(first, plain):
        n = tile * TILE + tl.arange(0, TILE)
        live = n < length
        slot = tl.load(table + n // SIZE).to(tl.int64) * SIZE + n % SIZE
        s = _scores(q, keys_ptr + base, slot, at, some, live, kv_row) * scale
        high, total, acc = _fold(
            s, live[None, :], high, total, acc, values_ptr + base, slot, at, some, live, kv_row
        )
    for tile in range(plain, tl.cdiv(length, TILE)):
        n = tile * TILE + tl.arange(0, TILE)
        live = n < length
        slot = tl.load(table + n // SIZE, live, other=0).to(tl.int64) * SIZE + n % SIZE
        s = _scores(q, keys_ptr + base, slot, at, some, live, kv_row) * scale
        behind = (position + m)[:, None] - n[None, :]
        seen = behind >= 0
        if WINDOW > 0:
            seen &= behind < WINDOW
        high, total, acc = _fold(
            s, seen, high, total, acc, values_ptr + base, slot, at, some, live, kv_row
        )
    total = tl.where(m < count, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * (HEADS * DIM) + head * DIM + at[None, :], out, inside)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is compiled for. `scale` multiplies scores; `window` in tokens, 0: none."""

    heads: int
    scale: float
    window: int


def decode(
    query: Tensor,
    positions: Tensor,
    pool: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    setting: tuple[Shape, Scratch],
) -> Tensor:
    """What one token of each sequence attends to, [rows, heads · dim]; its own key is in the pool.

    Args:
        query: [rows, heads · dim], rotated; a stride of 1 inside.
        positions: int32 [rows]: of the tokens.
        pool: keys and values, each [blocks, block size, kv_heads, dim].
        tables: int32 block tables, row after row, and int32 [1]: blocks from one row to the next.
    """
    keys, values = pool
    shape, scratch = setting
    _, size, kv_heads, dim = keys.shape
    rows = query.shape[0]
    out = torch.empty(rows, shape.heads * dim, dtype=query.dtype, device=query.device)
    _decode[(rows, kv_heads, scratch.splits)](
        query,
        positions,
        keys,
        values,
        *tables,
        scratch.parts,
        scratch.stats,
        scratch.arrived,
        out,
        shape.scale * LOG2E,
        Q_STRIDE=query.stride(0),
        HEADS=shape.heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        SIZE=size,
        WINDOW=shape.window,
        BLOCK_H=max(MIN_DOT, triton.next_power_of_2(shape.heads // kv_heads)),
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(dim)),
        TILE=_TILE,
        SHARED=triton.next_power_of_2(shape.heads // kv_heads),
        num_warps=4,
        num_stages=3,
        **early(query),
    )
    return out


def prefill(
    query: Tensor,
    pool: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    tiles: Tensor,
    shape: Shape,
    *,
    zeroed: bool = False,
) -> Tensor:
    """What packed chunks attend to, [rows, heads · dim]; keys and values are in the pool.

    Args:
        query: [rows, heads · dim], rotated; a stride of 1 inside.
        tables: one per chunk.
        tiles: int32 [n, 4]: first row, rows (at most `QUERIES`), position of the first, table.
        zeroed: rows of no tile become zeros, not what memory happened to hold.
    """
    keys, values = pool
    _, size, kv_heads, dim = keys.shape
    make = torch.zeros if zeroed else torch.empty
    out = make(query.shape[0], shape.heads * dim, dtype=query.dtype, device=query.device)
    _prefill[(tiles.shape[0], shape.heads)](
        query,
        keys,
        values,
        *tables,
        tiles,
        out,
        shape.scale * LOG2E,
        Q_STRIDE=query.stride(0),
        HEADS=shape.heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        SIZE=size,
        WINDOW=shape.window,
        BLOCK_M=QUERIES,
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(dim)),
        TILE=_TILE,
        num_warps=4,
        num_stages=3,
        **early(query),
    )
    return out
