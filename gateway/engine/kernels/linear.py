"""From a stored weight to the nn.Module that computes with it."""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.tensor import StoredLinear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.store import scheme


def make_linear(stored: StoredLinear, bias: Tensor | None, *, dtype: torch.dtype) -> KernelLinear:
    """The layer `x[..., K] -> [..., N]` over `stored`, holding its tensors without copying.

    Args:
        stored: from `store.pack` or mapped from an artifact.
        bias: [N] or None, never compressed.
        dtype: the activations' dtype, bf16 or fp32; the layer answers in the dtype of its input.

    The layer is safe to call from several threads, and a row's result does not depend on the other
    rows of the batch (quantization of activations is per row and group).

    Raises:
        ValueError: unknown scheme or layout, or a bias of the wrong length.
    """
    if bias is not None and tuple(bias.shape) != (int(stored.meta["n"]),):
        raise ValueError(f"bias of shape {tuple(bias.shape)} for {stored.meta['n']} outputs")

    def child(inner: StoredLinear, inner_bias: Tensor | None) -> KernelLinear:
        return make_linear(inner, inner_bias, dtype=dtype)

    return scheme(stored.scheme).linear(stored, bias, dtype, child).eval()
