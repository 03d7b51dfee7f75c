"""Int8 weights times inputs rounded to int8 on the fly: real integer products on CPU and CUDA.

Layout `rowmajor`: `codes` int8 [N, K], `scales` float32 [N], `sums` int32 [N] (of a row's codes:
the CPU's dot product takes inputs as code + 128), and `inputs` float32 [K] where inputs are
multiplied before they are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.forms.int8 import Int8
from compressors.tensor import StoredLinear
from gateway.engine.kernels.native import Feature, Int8Struct, NativeCall, fused, library
from gateway.engine.kernels.on_cuda import few_bytes
from gateway.engine.kernels.scheme import (
    SCRATCH_BYTES,
    KernelLinear,
    PackChild,
    Scheme,
    UnpackChild,
    expect,
)

LEVELS = 127.0
_TINY = 1e-30  # a token smaller than that counts as zeros, as in the native kernel
_MAX_COLUMNS = 1 << 16  # 255 · 127 · K must fit 32 bits
_CUDA_ROWS = 32  # cuBLAS multiplies no fewer than 17 rows of int8
_CUDA_SCRATCH = 32  # times SCRATCH_BYTES


def pack(form: Int8, _child: PackChild) -> StoredLinear:
    n, k = form.shape
    if form.scales.shape != (n,) or not bool(torch.isfinite(form.scales).all()):
        raise ValueError(f"scales {tuple(form.scales.shape)} for {n} rows, or not finite")
    tensors = {
        "codes": form.codes.contiguous(),
        "scales": form.scales.float().contiguous(),
        "sums": form.codes.sum(1, dtype=torch.int32),
    }
    if form.inputs is not None:
        if form.inputs.shape != (k,) or not bool(torch.isfinite(form.inputs).all()):
            raise ValueError(f"input factors {tuple(form.inputs.shape)} for {k}, or not finite")
        tensors["inputs"] = form.inputs.float().contiguous()
    return StoredLinear("int8", "rowmajor", {"n": n, "k": k}, tensors)


def unpack(stored: StoredLinear, _child: UnpackChild) -> Int8:
    tensors = stored.tensors
    return Int8(tensors["codes"], tensors["scales"], tensors.get("inputs"))


class Int8Linear(KernelLinear):
    """W8A8 layer. Every row of inputs has a step of its own."""

    codes: Tensor
    scales: Tensor
    sums: Tensor
    inputs: Tensor | None

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, _child: object
    ) -> None:
        super().__init__(stored, bias, dtype)
        n, k = self.out_features, self.in_features
        self.hold(stored, "codes", "scales", "sums", "inputs")
        expect(self.codes, (n, k), torch.int8)
        expect(self.scales, (n,), torch.float32)
        expect(self.sums, (n,), torch.int32)
        if self.inputs is not None:
            expect(self.inputs, (k,), torch.float32)
        self._call = self.bind()

    def bind(self) -> NativeCall | None:
        dll = library(Feature.INT8)
        if dll is None or not self.codes.is_cpu or self.in_features > _MAX_COLUMNS:
            return None
        bias = None if self.bias is None else self.bias.float()
        struct = Int8Struct(
            codes=self.codes.data_ptr(),
            scales=self.scales.data_ptr(),
            sums=self.sums.data_ptr(),
            inputs=None if self.inputs is None else self.inputs.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            n=self.out_features,
            k=self.in_features,
        )
        keep = (self.codes, self.scales, self.sums, self.inputs, bias)
        return NativeCall(dll, "pressgate_int8", struct, keep, bf16_input=False)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        weight = self.codes[start:stop].to(exact) * self.scales[start:stop].unsqueeze(1)
        return (weight if self.inputs is None else weight * self.inputs).to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        """Through integer products; as a dense layer where CUDA has none for the shape."""
        kernels = fused() if x.is_cuda else None
        if x.is_cuda and kernels is None and (self.in_features % 8 or self.out_features % 8):
            return super().reference(x)
        rows = x.reshape(-1, self.in_features)
        scratch = SCRATCH_BYTES * (_CUDA_SCRATCH if x.is_cuda else 1)
        step = max(_CUDA_ROWS, scratch // (4 * self.out_features))
        out = x.new_empty(rows.shape[0], self.out_features)
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            out[start : start + step] = (
                self._integers(part) if kernels is None else self._fused(part, kernels)
            )
        return out.view(*x.shape[:-1], self.out_features)

    def _integers(self, x: Tensor) -> Tensor:
        codes, steps = round_rows(x, self.inputs)
        out = self._sums(codes) * steps * self.scales
        return out if self.bias is None else out + self.bias.float()

    def _fused(self, x: Tensor, kernels: Any) -> Tensor:
        if len(x) <= _CUDA_ROWS and self.in_features % 16 == 0:
            return few_bytes(x, self.codes, self.scales, inputs=self.inputs, bias=self.bias)
        codes, steps = kernels.round_rows(x, self.inputs, torch.int8)
        odd = self.in_features % 8 or self.out_features % 8
        if odd or len(x) <= kernels.BLOCK_ROWS:
            out: Tensor = kernels.product(
                codes, steps, self.codes, self.scales, bias=self.bias, dtype=x.dtype
            )
        else:
            out = kernels.scale(self._sums(codes), steps, self.scales, self.bias, x.dtype)
        return out

    def _sums(self, codes: Tensor) -> Tensor:
        """int32 [M, N]: codes int8 [M, K] times the weight's."""
        rows = len(codes)
        if codes.is_cuda and rows < _CUDA_ROWS:
            codes = F.pad(codes, (0, 0, 0, _CUDA_ROWS - rows))
        return torch._int_mm(codes, self.codes.t())[:rows]


def round_rows(x: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and steps float32 [M, 1] of x [M, K] times `inputs`."""
    values = x.float() if inputs is None else x * inputs
    top = torch.linalg.vector_norm(values, float("inf"), dim=1, keepdim=True)
    inverse = torch.where(top > _TINY, LEVELS / top, top * 0)  # what is not finite stays so
    return torch.round(values * inverse).to(torch.int8), top / LEVELS


SCHEME = Scheme(pack, unpack, Int8Linear)
