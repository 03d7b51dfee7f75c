"""E4M3 weights: FP8 products where the GPU has them, else widened piece by piece.

Layout `rowmajor`: `codes` uint8 [N, K] (the bytes of float8_e4m3fn), `scales` float32 [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.float8 import Float8
from compressors.tensor import StoredLinear
from gateway.engine.kernels.native import Feature, Float8Struct, NativeCall, fused, library
from gateway.engine.kernels.on_cuda import few_bytes
from gateway.engine.kernels.scheme import KernelLinear, PackChild, Scheme, UnpackChild, expect

LARGEST = 448.0
_TINY = 1e-30
_ALIGN = 16  # of rows and columns, for the GPU's FP8 product
_FP8_CAPABILITY = (8, 9)
# Measured on an H200: beyond, cuBLAS's FP8 product is as fast as the kernel of few rows.
_CUDA_ROWS = 16


def pack(form: Float8, _child: PackChild) -> StoredLinear:
    n, k = form.shape
    if form.scales.shape != (n,) or not bool(torch.isfinite(form.scales).all()):
        raise ValueError(f"scales {tuple(form.scales.shape)} for {n} rows, or not finite")
    tensors = {
        "codes": form.codes.contiguous().view(torch.uint8),
        "scales": form.scales.float().contiguous(),
    }
    return StoredLinear("float8", "rowmajor", {"n": n, "k": k}, tensors)


def unpack(stored: StoredLinear, _child: UnpackChild) -> Float8:
    return Float8(stored.tensors["codes"].view(torch.float8_e4m3fn), stored.tensors["scales"])


class Float8Linear(KernelLinear):
    """E4M3 layer. On the GPU every row of inputs is rounded to E4M3 with a scale of its own."""

    codes: Tensor
    scales: Tensor

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, _child: object
    ) -> None:
        super().__init__(stored, bias, dtype)
        self.hold(stored, "codes", "scales")
        expect(self.codes, (self.out_features, self.in_features), torch.uint8)
        expect(self.scales, (self.out_features,), torch.float32)
        self._call = self.bind()

    def bind(self) -> NativeCall | None:
        dll = library(Feature.BF16)
        if dll is None or not self.codes.is_cpu:
            return None
        bias = None if self.bias is None else self.bias.float()
        struct = Float8Struct(
            codes=self.codes.data_ptr(),
            scales=self.scales.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            n=self.out_features,
            k=self.in_features,
        )
        keep = (self.codes, self.scales, bias)
        return NativeCall(dll, "pressgate_float8", struct, keep, bf16_input=True)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self._call is not None and dtype == torch.bfloat16:
            return self._call.expand(start, stop)
        return (widen(self.codes[start:stop]) * self.scales[start:stop].unsqueeze(1)).to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == torch.bfloat16 and self._has_fp8(x.device):
            rows = x.reshape(-1, self.in_features)
            if 0 < len(rows) <= _CUDA_ROWS and fused() is not None:
                weight = self.codes.view(torch.float8_e4m3fn)
                out = few_bytes(rows, weight, self.scales, inputs=None, bias=self.bias)
                return out.view(*x.shape[:-1], self.out_features)
            return self._fp8(x)
        return super().reference(x)

    def _has_fp8(self, device: torch.device) -> bool:
        fits = self.in_features % _ALIGN == 0 and self.out_features % _ALIGN == 0
        return fits and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY

    def _fp8(self, x: Tensor) -> Tensor:
        rows, kernels = x.reshape(-1, self.in_features), fused()
        if kernels is None:
            codes, scale = round_rows(rows)
        else:
            codes, scale = kernels.round_rows(rows, None, torch.float8_e4m3fn)
        weight = self.codes.view(torch.float8_e4m3fn).t()
        out = torch._scaled_mm(
            codes,
            weight,
            scale_a=scale,
            scale_b=self.scales.unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] and scales float32 [M, 1] of x [M, K]; what is not finite stays so."""
    top = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scale = top.clamp_(min=_TINY) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def widen(codes: Tensor) -> Tensor:
    """Float32 values of E4M3 bytes. Their bits are those of a float16 shifted by seven, its
    exponent eight too small; torch's own cast takes ten times as long."""
    halves = (codes.view(torch.int8).to(torch.int16) << 7) & -0x4001
    return halves.view(torch.float16).float().mul_(256.0)


SCHEME = Scheme(pack, unpack, Float8Linear)
