# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: PLR0915, PLR0917 (a kernel has one parameter per tensor and size)
"""Attention of one token of one sequence: `attend.decode` where latency is all that counts.

What earlier steps left in the pool is loaded before the kernel before is over; only the token's own
key and value are waited for. The result may leave as digits (`triton_digits`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.cuda.attend import LOG2E, MIN_DOT, Scratch, Shape, together
from gateway.engine.cuda.launch import await_inputs, early
from gateway.engine.cuda.staging import Batch
from gateway.engine.decoder import Rotary
from gateway.engine.kernels.triton_digits import Digits, make_digits, store_digits

_TILE = 64  # keys at once


@triton.jit
def _leave(
    v,
    out_ptr,
    grid_ptr,
    first,
    count,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
):
    """Store `count` of ROWS heads [ROWS, BLOCK_D] from head `first` on."""
    if GROUP:
        rows: tl.constexpr = ROWS * DIM // GROUP
        v = tl.reshape(v.to(T).to(tl.float32), [rows, GROUP])
        live = tl.arange(0, rows) < count * DIM // GROUP
        store_digits(v, out_ptr, grid_ptr, first * DIM // GROUP, live, K, rows, GROUP)
    else:
        head, at = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        inside = (head < count)[:, None] & (at < DIM)[None, :]
        tl.store(out_ptr + (first + head)[:, None] * DIM + at[None, :], v.to(T), inside)


@triton.jit
def _turns(position_ptr, frequency_ptr, turns_ptr, factor, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines [DIM], and sines signed for the lower and the upper half."""
    at = tl.arange(0, BLOCK)
    low = at < DIM // 2
    frequency = tl.load(frequency_ptr + tl.where(low, at, at - DIM // 2), at < DIM, other=0.0)
    angle = tl.load(position_ptr).to(tl.float32) * frequency
    tl.store(turns_ptr + at, tl.cos(angle) * factor, at < DIM)
    sin = tl.where(low, -1.0, 1.0) * tl.sin(angle) * factor
    tl.store(turns_ptr + DIM + at, sin, at < DIM)


@triton.jit
def _fold(scores, seen, high, total, acc, value):
    """One tile of keys into the running softmax."""
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(high, tl.max(scores, 1))
    weight = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(high - higher)
    acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return higher, total * fade + tl.sum(weight, 1), acc


@triton.jit
def _decode_one(
    query_ptr,
    position_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    parts_ptr,
    stats_ptr,
    arrived_ptr,
    out_ptr,
    grid_ptr,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs [kv head, split]."""
    kv = tl.program_id(0)
    split = tl.program_id(1)
    shared: tl.constexpr = HEADS // KV_HEADS
    kv_row: tl.constexpr = KV_HEADS * DIM
    T: tl.constexpr = query_ptr.dtype.element_ty
    last = tl.load(position_ptr).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(last + 1 - WINDOW, 0)
    start = first // TILE
    tiles = tl.cdiv(last + 1, TILE) - start
    each = tl.cdiv(tiles, tl.num_programs(1))
    used = tl.cdiv(tiles, each)
    begin = start + split * each
    h = tl.arange(0, BLOCK_H)
    at = tl.arange(0, BLOCK_D)
    some = at < DIM
    n = begin * TILE + tl.arange(0, TILE)
    live = (n <= last) & (n >= first) & (split < used)
    slot = tl.load(table_ptr + n // SIZE, live, other=0).to(tl.int64) * SIZE + n % SIZE
    key_at = keys_ptr + kv * DIM + slot[None, :] * kv_row + at[:, None]
    value_at = values_ptr + kv * DIM + slot[:, None] * kv_row + at[None, :]
    old = live & (n < last)
    key = tl.load(key_at, some[:, None] & old[None, :], other=0.0)
    value = tl.load(value_at, old[:, None] & some[None, :], other=0.0)
    await_inputs(EARLY)
    if split < used:
        inside = (h < shared)[:, None] & some[None, :]
        q = tl.load(query_ptr + (kv * shared + h)[:, None] * DIM + at[None, :], inside, other=0.0)
        own = live & (n == last)  # written by the kernel before
        key = tl.load(key_at, some[:, None] & own[None, :], other=key)
        value = tl.load(value_at, own[:, None] & some[None, :], other=value)
        s = tl.where(live[None, :], tl.dot(q, key, input_precision="ieee") * scale, float("-inf"))
        high = tl.max(s, 1)
        weight = tl.exp2(s - high[:, None])
        total = tl.sum(weight, 1)
        acc = tl.dot(weight.to(T), value, input_precision="ieee")
        for tile in range(begin + 1, tl.minimum(begin + each, start + tiles)):
            n = tile * TILE + tl.arange(0, TILE)
            live = n <= last
            slot = tl.load(table_ptr + n // SIZE, live, other=0).to(tl.int64) * SIZE + n % SIZE
            key_at = keys_ptr + kv * DIM + slot[None, :] * kv_row + at[:, None]
            value_at = values_ptr + kv * DIM + slot[:, None] * kv_row + at[None, :]
            key = tl.load(key_at, some[:, None] & live[None, :], other=0.0)
            value = tl.load(value_at, live[:, None] & some[None, :], other=0.0)
            s = tl.dot(q, key, input_precision="ieee") * scale
            high, total, acc = _fold(s, live, high, total, acc, value)
        part = split * HEADS + kv * shared + h
        tl.store(parts_ptr + part[:, None] * DIM + at[None, :], acc, inside)
        tl.store(stats_ptr + part * 2, high, h < shared)
        tl.store(stats_ptr + part * 2 + 1, total, h < shared)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + kv, 1, sem="acq_rel") == used - 1:
            tl.debug_barrier()
            own_head = tl.arange(0, SHARED)
            found = together(
                parts_ptr, stats_ptr, used, 0, 1, kv * shared + own_head, own_head < shared,
                at, some, DIM, HEADS, 8,
            )  # fmt: skip
            _leave(
                found, out_ptr, grid_ptr, kv * shared, shared,
                HEADS * DIM, SHARED, DIM, BLOCK_D, GROUP, T,
            )  # fmt: skip
            tl.store(arrived_ptr + kv, 0)


def turns(position: Tensor, rotary: Rotary) -> Tensor:
    """fp32 [2, dim]: how one token's heads are turned, for all layers of a step."""
    dim = 2 * len(rotary.frequency)
    out = torch.empty(2, dim, dtype=torch.float32, device=position.device)
    block = triton.next_power_of_2(dim)
    _turns[(1,)](position, rotary.frequency, out, rotary.scale, DIM=dim, BLOCK=block, num_warps=4)
    return out


def decode_one(
    query: Tensor,
    staged: Batch,
    pool: tuple[Tensor, Tensor],
    setting: tuple[Shape, Scratch],
    group: int = 0,
) -> Tensor | Digits:
    """`attend.decode` of one row [1, heads · dim].

    Args:
        staged: a batch of one row.
        group: 0, or columns of a group of the digits that the answer becomes (`splits_into`).
    """
    keys, values = pool
    shape, scratch = setting
    _, size, kv_heads, dim = keys.shape
    k, device = shape.heads * dim, query.device
    digits = make_digits(k, group, device) if group else None
    out = torch.empty(1, k, dtype=query.dtype, device=device)
    _decode_one[(kv_heads, scratch.splits)](
        query,
        staged.positions,
        keys,
        values,
        staged.tables[0],
        scratch.parts,
        scratch.stats,
        scratch.arrived,
        *(digits or (out, out)),
        shape.scale * LOG2E,
        HEADS=shape.heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        SIZE=size,
        WINDOW=shape.window,
        BLOCK_H=max(MIN_DOT, triton.next_power_of_2(shape.heads // kv_heads)),
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(dim)),
        TILE=_TILE,
        SHARED=triton.next_power_of_2(shape.heads // kv_heads),
        GROUP=group,
        num_warps=4,
        **early(query),
    )
    return out if digits is None else digits


def splits_into(heads: int, kv_heads: int, dim: int, group: int) -> bool:
    """Whether the heads of one KV head are whole groups, and powers of two."""
    shared = heads // kv_heads
    whole = not dim & (dim - 1) and not shared & (shared - 1) and dim >= MIN_DOT
    return whole and shared * dim % group == 0
