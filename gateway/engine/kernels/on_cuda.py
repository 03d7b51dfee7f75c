"""Layers of packed codes on a GPU: which kernel computes how many tokens.

A few tokens go through the codes directly; beyond that the weight is made dense once per call, in
scratch memory, and cuBLAS multiplies. Nothing here waits for the device, so a call can be captured
in a CUDA graph once it ran for as many tokens (kernels are compiled at their first use).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.engine.kernels.codes import (
    Codes,
    bytes_tiling,
    digit_group,
    digit_tiling,
    is_large,
    packed_tiling,
)
from gateway.engine.kernels.native import fused

_SCRATCH = 256 << 20  # bytes of dense weight at a time
_HOPPER = 9
# Measured: beyond so many tokens a dense copy of the weight pays; by planes of the codes.
MAX_ROWS = {1: 96, 2: 48, 3: 48}


class PackedCall:
    """One packed weight on a GPU. Takes bf16 for products; makes rows of any float type.

    Args:
        columns: int32 [stored columns]: the layer's column of each, -1 for padding; None: in order.
        k: columns of the layer.

    Attributes:
        group: columns of a group of the digits that `one` takes; 0: it takes none.
    """

    def __init__(self, codes: Codes, columns: Tensor | None, k: int, bias: Tensor | None) -> None:
        self._codes, self._columns, self._k, self._bias = codes, columns, k, bias
        self._thin: Any = import_module("gateway.engine.kernels.triton_grouped")
        self._wide: Any = import_module("gateway.engine.kernels.triton_expand")
        device = codes.scales.device
        self._early = starts_early(device)
        self.group = digit_group(codes) if columns is None else 0
        self._one: Any = import_module("gateway.engine.kernels.triton_one")

    def takes(self, x: Tensor) -> bool:
        return x.dtype is torch.bfloat16 and x.is_cuda and x.numel() > 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., N] of x bf16 [..., K]."""
        codes = self._codes
        rows = x.reshape(-1, self._k).contiguous()
        few = len(rows) <= MAX_ROWS[len(codes.planes)]
        tiling = packed_tiling(codes, len(rows)) if few else None
        if tiling is None:
            out = self._dense_product(rows)
        else:
            if self._columns is not None:
                rows = self._wide.take(rows, self._columns)
            # Between large layers of bytes it costs more than it gives.
            large = 8 in codes.widths and is_large(codes.n)
            early = self._early and len(rows) == 1 and not large
            out = self._thin.product(rows, codes, self._bias, tiling, early=early)
        return out.view(*x.shape[:-1], codes.n)

    def one(self, digits: Any, *, heads: Any = None) -> Tensor:
        """bf16 [1, N] of one token as digits (`triton_digits.Digits`) in groups of `group`.

        `heads`: see `triton_one.product`.
        """
        codes = self._codes
        tiling = digit_tiling(codes)
        out: Tensor = self._one.product(
            digits, codes, self._bias, tiling, heads=heads, early=self._early
        )
        return out

    def _dense_product(self, x: Tensor) -> Tensor:
        n, bias = self._codes.n, None if self._bias is None else self._bias.to(x.dtype)
        step = max(16, _SCRATCH // (2 * self._k) // 16 * 16)
        if step >= n:
            return F.linear(x, self.rows(0, n, x.dtype), bias)
        out = x.new_empty(len(x), n)
        for start in range(0, n, step):
            stop = min(start + step, n)
            part = None if bias is None else bias[start:stop]
            out[:, start:stop] = F.linear(x, self.rows(start, stop, x.dtype), part)
        return out

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop of the weight, [stop-start, K] in `dtype`."""
        out: Tensor = self._wide.expand(
            self._codes, self._columns, self._k, dtype, start=start, stop=stop
        )
        return out

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `index` (int64 [M], each below N), [M, K] in `dtype`."""
        out: Tensor = self._wide.look_up(self._codes, self._columns, self._k, dtype, index)
        return out


def packed_call(
    codes: Codes, columns: Tensor | None, k: int, bias: Tensor | None
) -> PackedCall | None:
    """The call for a weight on a GPU; None elsewhere, and where Triton is not."""
    if not codes.scales.is_cuda or fused() is None:
        return None
    return PackedCall(codes, columns, k, bias)


def few_bytes(
    x: Tensor, weight: Tensor, scales: Tensor, *, inputs: Tensor | None, bias: Tensor | None
) -> Tensor:
    """[M, N]: a few tokens x [M, K], each rounded to the weight's type, times the weight [N, K].

    Args:
        weight: int8 or float8_e4m3fn, K a multiple of 16; `scales` float32 [N].
        inputs: float32 [K] multiplies x before it is rounded.
    """
    kernels: Any = import_module("gateway.engine.kernels.triton_eight")
    rounding: Any = import_module("gateway.engine.kernels.fused")
    x = x.contiguous()
    tiling = bytes_tiling(weight.shape[0], weight.shape[1], len(x))
    alone = len(x) == 1
    codes, steps = (x, None) if alone else rounding.round_rows(x, inputs, weight.dtype)
    out: Tensor = kernels.product(
        codes,
        steps,
        weight,
        scales,
        inputs=inputs,
        bias=bias,
        dtype=x.dtype,
        tiling=tiling,
    )
    return out


def starts_early(device: torch.device) -> bool:
    """Whether kernels on this device may start while the one before still runs."""
    return device.index is not None and _able(device.index)


@cache
def _able(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    return torch.version.cuda is not None and capability[0] >= _HOPPER
