# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: PLR0917 (a kernel has one parameter per tensor and size)
"""One row as digits: what a product of packed codes and one token reads (`triton_digits`).

The small operations before such a product end in digits instead of rounded numbers, so that this
costs no launch and the product converts nothing. Arithmetic is in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gateway.engine.cuda.kernels import activated
from gateway.engine.cuda.launch import await_inputs, early
from gateway.engine.decoder import Norm
from gateway.engine.kernels.triton_digits import Digits, make_digits, store_digits

_ACTIVATED = 4  # groups at once


@triton.jit
def _add_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    planes_ptr,
    grid_ptr,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    group = tl.arange(0, ROWS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = at < N
    weight = tl.load(weight_ptr + at, live, other=0.0).to(tl.float32)
    await_inputs(EARLY)
    x = tl.load(x_ptr + at, live, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, live, other=0.0).to(tl.float32)
        kept = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, kept, live)
        x = kept.to(tl.float32)  # what the next layers will read
    y = x * tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / N + eps) * weight
    y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    store_digits(y, planes_ptr, grid_ptr, 0, group * GROUP < N, N, ROWS, GROUP)


@triton.jit
def _gated(
    gate_ptr,
    up_ptr,
    planes_ptr,
    grid_ptr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    first = tl.program_id(0) * ROWS
    group = first + tl.arange(0, ROWS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = at < N
    gate = tl.load(gate_ptr + at, live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, live, other=0.0).to(tl.float32)
    y = (activated(gate, GELU) * up).to(gate_ptr.dtype.element_ty).to(tl.float32)
    store_digits(y, planes_ptr, grid_ptr, first, group * GROUP < N, N, ROWS, GROUP)


def add_norm(x: Tensor, delta: Tensor | None, norm: Norm, group: int) -> Digits:
    """`kernels.add_norm` of one row [1, n], n a multiple of `group`, as digits."""
    n = x.shape[1]
    out = make_digits(n, group, x.device)
    rows = triton.next_power_of_2(n // group)
    _add_norm[(1,)](
        x,
        x if delta is None else delta,
        norm.weight,
        *out,
        norm.eps,
        N=n,
        ROWS=rows,
        GROUP=group,
        ADD=delta is not None,
        num_warps=min(16, max(1, rows * group // 256)),
        **early(x),
    )
    return out


def gated(gate: Tensor, up: Tensor, activation: str, group: int) -> Digits:
    """`kernels.gated` of one row [1, n], n a multiple of `group`, as digits."""
    n = gate.shape[1]
    out = make_digits(n, group, gate.device)
    _gated[(triton.cdiv(n, _ACTIVATED * group),)](
        gate,
        up,
        *out,
        N=n,
        ROWS=_ACTIVATED,
        GROUP=group,
        GELU=activation == "gelu_tanh",
        num_warps=2,
        **early(gate),
    )
    return out
