# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: PLR0917 (a kernel has one parameter per tensor and size)
"""A dense weight times one row in Triton: as fast as the weight can be read.

cuBLAS's kernels for one row leave a fifth to a half of the bandwidth unused on all but the largest
weights. Products and sums are in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.cuda.kernels import activated
from gateway.engine.cuda.launch import await_inputs, early

_ROWS = 2  # of the weight, per program
_COLUMNS = 1024


@triton.jit
def _matvec(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    rows = weight_ptr + n.to(tl.int64)[:, None] * K
    inside = (n < N)[:, None]
    w = tl.load(
        rows + k[None, :], inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first"
    )
    await_inputs(EARLY)
    x = tl.load(x_ptr + k, k < K, other=0.0)
    acc = w.to(tl.float32) * x.to(tl.float32)[None, :]
    for start in range(COLUMNS, K, COLUMNS):
        at = start + k
        w = tl.load(
            rows + at[None, :], inside & (at < K)[None, :], other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(x_ptr + at, at < K, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, total.to(out_ptr.dtype.element_ty), n < N)


@triton.jit
def _gated_matvec(
    x_ptr,
    weight_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Row n of the gate and row N + n, the up projection's, in one program."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    rows = weight_ptr + n.to(tl.int64)[:, None] * K
    inside = (n < N)[:, None]
    live = inside & (k < K)[None, :]
    g = tl.load(rows + k[None, :], live, other=0.0, eviction_policy="evict_first")
    u = tl.load(rows + N * K + k[None, :], live, other=0.0, eviction_policy="evict_first")
    await_inputs(EARLY)
    x = tl.load(x_ptr + k, k < K, other=0.0).to(tl.float32)[None, :]
    gate, up = g.to(tl.float32) * x, u.to(tl.float32) * x
    for start in range(COLUMNS, K, COLUMNS):
        at = start + k
        live = inside & (at < K)[None, :]
        g = tl.load(rows + at[None, :], live, other=0.0, eviction_policy="evict_first")
        u = tl.load(rows + N * K + at[None, :], live, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + at, at < K, other=0.0).to(tl.float32)[None, :]
        gate += g.to(tl.float32) * x
        up += u.to(tl.float32) * x
    out = activated(tl.sum(gate, 1), GELU) * tl.sum(up, 1)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), n < N)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of one row: x [1, K], weight [N, K] → [1, N], all contiguous."""
    n, k = weight.shape
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    _matvec[(triton.cdiv(n, _ROWS),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        N=n,
        K=k,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(k)),
        BIAS=bias is not None,
        num_warps=4,
        **early(x),
    )
    return out


def gated_matvec(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """act(gate · x) · (up · x) of one row x [1, K]; weight [2 N, K]: the gate, then up → [1, N]."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    _gated_matvec[(triton.cdiv(n, _ROWS),)](
        x,
        weight,
        out,
        N=n,
        K=k,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(k)),
        GELU=activation == "gelu_tanh",
        num_warps=4,
        **early(x),
    )
    return out
