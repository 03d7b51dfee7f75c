# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: PLR0917 (a kernel has one parameter per tensor and size)
"""Triton kernels of the small operations between a decoder's linears.

Each reads its rows once and writes them once; arithmetic is in fp32. They know rows, never
sequences. Under TRITON_INTERPRET=1 they run on CPU tensors, which is how they are tested there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.cuda.launch import await_inputs, early
from gateway.engine.decoder import Norm, Rotary

_ACTIVATE_BLOCK = 1024
_HEADS_AT_ONCE = 4


@triton.jit
def _add_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < N
    weight = tl.load(weight_ptr + at, live, other=0.0).to(tl.float32)
    await_inputs(EARLY)
    x = tl.load(x_ptr + row * N + at, live, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + row * N + at, live, other=0.0).to(tl.float32)
        kept = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * N + at, kept, live)
        x = kept.to(tl.float32)  # what the next layers will read
    y = x * tl.rsqrt(tl.sum(x * x, 0) / N + eps) * weight
    tl.store(out_ptr + row * N + at, y.to(out_ptr.dtype.element_ty), live)


@triton.jit
def _turned(low, high, angle, factor):
    cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _head_norm(low, high, weight_ptr, at, live, eps, DIM: tl.constexpr):
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM
    scale = tl.rsqrt(mean + eps)[:, None]
    first = tl.load(weight_ptr + at, live, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + DIM // 2 + at, live, other=0.0).to(tl.float32)
    return low * scale * first[None], high * scale * second[None]


@triton.jit
def _turn_and_store(
    query_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    writes_ptr,
    frequency_ptr,
    query_norm_ptr,
    key_norm_ptr,
    keys_ptr,
    values_ptr,
    factor,
    query_eps,
    key_eps,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs [row, part]: first the parts of the query's heads, then the key's, the value's."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    kv_parts: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    at = tl.arange(0, HALF)
    some = at < DIM // 2
    angle = tl.load(positions_ptr + row).to(tl.float32) * tl.load(
        frequency_ptr + at, some, other=0.0
    )
    await_inputs(EARLY)
    if part < q_parts:
        head = part * GROUP + tl.arange(0, GROUP)
        live = (head < HEADS)[:, None] & some[None]
        base = query_ptr + row * Q_STRIDE + head[:, None] * DIM + at[None]
        low = tl.load(base, live, other=0.0).to(tl.float32)
        high = tl.load(base + DIM // 2, live, other=0.0).to(tl.float32)
        if NORMED:
            low, high = _head_norm(low, high, query_norm_ptr, at, some, query_eps, DIM)
        low, high = _turned(low, high, angle[None], factor)
        tl.store(base, low.to(query_ptr.dtype.element_ty), live)
        tl.store(base + DIM // 2, high.to(query_ptr.dtype.element_ty), live)
    else:
        slot = tl.load(writes_ptr + row).to(tl.int64)
        head = (part - q_parts) % kv_parts * GROUP + tl.arange(0, GROUP)
        live = (head < KV_HEADS)[:, None] & some[None]
        offset = head[:, None] * DIM + at[None]
        target = slot * (KV_HEADS * DIM) + offset
        if part < q_parts + kv_parts:
            base = key_ptr + row * K_STRIDE + offset
            low = tl.load(base, live, other=0.0).to(tl.float32)
            high = tl.load(base + DIM // 2, live, other=0.0).to(tl.float32)
            if NORMED:
                low, high = _head_norm(low, high, key_norm_ptr, at, some, key_eps, DIM)
            low, high = _turned(low, high, angle[None], factor)
            tl.store(keys_ptr + target, low.to(keys_ptr.dtype.element_ty), live)
            tl.store(keys_ptr + target + DIM // 2, high.to(keys_ptr.dtype.element_ty), live)
        else:
            base = value_ptr + row * V_STRIDE + offset
            tl.store(values_ptr + target, tl.load(base, live), live)
            tl.store(values_ptr + target + DIM // 2, tl.load(base + DIM // 2, live), live)


@triton.jit
def activated(gate, GELU: tl.constexpr):
    """A value of `decoder.ACTIVATIONS` of fp32 numbers."""
    if GELU:  # tanh's form: u/2 · (1 + tanh t) = u · sigmoid(2 t)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate *= tl.sigmoid(gate)
    return gate


@triton.jit
def _gated(
    gate_ptr,
    up_ptr,
    out_ptr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    gate = tl.load(gate_ptr + row * GATE_STRIDE + at, live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + at, live, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * N + at, (activated(gate, GELU) * up).to(out_ptr.dtype.element_ty), live
    )


class Turn(NamedTuple):
    """What is done to a layer's heads: a norm of a query's and of a key's head [dim], rotation."""

    norms: tuple[Norm, Norm] | None
    rotary: Rotary


def add_norm(x: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
    """RMSNorm of x + delta; the sum stays in `x` [rows, n], which is written in place.

    Args:
        delta: [rows, n] contiguous, or None: nothing to add.
    """
    rows, n = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(n)
    warps = min(16, max(1, block // 512))
    _add_norm[(rows,)](
        x,
        x if delta is None else delta,
        norm.weight,
        out,
        norm.eps,
        N=n,
        BLOCK=block,
        ADD=delta is not None,
        num_warps=warps,
        **early(x),
    )
    return out


def turn_and_store(
    rows: tuple[Tensor, Tensor, Tensor],
    turn: Turn,
    where: tuple[Tensor, Tensor],
    pool: tuple[Tensor, Tensor],
) -> None:
    """Norm (if any) and rotate each head of the queries, in place, and of the keys; put keys and
    values into the pool.

    Args:
        rows: query [rows, heads · dim], key and value [rows, kv_heads · dim]; strides of 1 inside.
        where: positions and flat pool slots of the rows, integers [rows].
        pool: keys and values, each [blocks, block size, kv_heads, dim].
    """
    query, key, value = rows
    keys, values = pool
    kv_heads, dim = keys.shape[2], keys.shape[3]
    heads = query.shape[1] // dim
    parts = triton.cdiv(heads, _HEADS_AT_ONCE) + 2 * triton.cdiv(kv_heads, _HEADS_AT_ONCE)
    query_norm, key_norm = turn.norms or (None, None)
    _turn_and_store[(query.shape[0], parts)](
        query,
        key,
        value,
        *where,
        turn.rotary.frequency,
        query if query_norm is None else query_norm.weight,
        query if key_norm is None else key_norm.weight,
        keys,
        values,
        turn.rotary.scale,
        0.0 if query_norm is None else query_norm.eps,
        0.0 if key_norm is None else key_norm.eps,
        Q_STRIDE=query.stride(0),
        K_STRIDE=key.stride(0),
        V_STRIDE=value.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF=triton.next_power_of_2(dim // 2),
        GROUP=_HEADS_AT_ONCE,
        NORMED=query_norm is not None,
        num_warps=1,
        **early(query),
    )


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, each [rows, n] with a stride of 1 inside; `decoder.ACTIVATIONS`'s values."""
    rows, n = gate.shape
    out = torch.empty(rows, n, dtype=gate.dtype, device=gate.device)
    _gated[(rows, triton.cdiv(n, _ACTIVATE_BLOCK))](
        gate,
        up,
        out,
        GATE_STRIDE=gate.stride(0),
        UP_STRIDE=up.stride(0),
        N=n,
        BLOCK=_ACTIVATE_BLOCK,
        GELU=activation == "gelu_tanh",
        num_warps=4,
        **early(gate),
    )
    return out
