"""What one storage scheme is: how it packs, unpacks and computes. No scheme's details live here.

A scheme is one file of this package that exports `SCHEME`, plus one line in `store.SCHEMES`. Nested
schemes (a low-rank pair, quantized values of a sparse layer) receive the recursion as an
argument, so scheme files never import the registry.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressors.tensor import LinearForm, StoredLinear
from gateway.engine.kernels.native import NativeCall
from gateway.engine.kernels.on_cuda import PackedCall

PackChild = Callable[[LinearForm], StoredLinear]
UnpackChild = Callable[[StoredLinear], LinearForm]

# Rows of a weight are expanded in pieces of at most this many bytes when an op needs a dense
# operand.
SCRATCH_BYTES = 8 << 20
ONEDNN_GRAIN = 1 << 20  # multiply-adds


class KernelLinear(nn.Module):
    """A linear layer computing from storage tensors: `forward(x[..., K]) -> [..., N]` in x's dtype.

    Storage tensors are buffers under their suffix (dots become `_`); they may be mmap'd and are
    never written or copied. `.to(dtype)` does not touch them (their dtypes are the layout's);
    `.to(device)` moves them.

    Attributes:
        in_features, out_features: K and N.
        compute_dtype: the activation dtype the layer is meant for (others work, maybe slower).
    """

    def __init__(self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = int(stored.meta["n"]), int(stored.meta["k"])
        self.compute_dtype = dtype
        self._call: NativeCall | None = None
        self._packed: PackedCall | None = None  # of packed codes on a GPU
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    def hold(self, stored: StoredLinear, *suffixes: str) -> None:
        """Register the named storage tensors as buffers, without copying."""
        for suffix in suffixes:
            self.register_buffer(suffix, stored.tensors.get(suffix))

    @property
    def resident_bytes(self) -> int:
        """Bytes of all storage tensors and biases this layer keeps alive, children included."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    @abstractmethod
    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop of the weight, [stop-start, K] in `dtype`."""

    def bind(self) -> NativeCall | None:
        """The native kernel over the present buffers, None where torch has to do."""
        return None

    @property
    def native(self) -> NativeCall | None:
        """The kernel that is the whole layer; None where there is none, or it is but a part."""
        return self._call if type(self).forward is KernelLinear.forward else None

    def forward(self, x: Tensor) -> Tensor:
        call = self._call
        if call is not None and call.takes(x):
            return call(x)
        return self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        """The layer through plain torch ops: any device, at most SCRATCH_BYTES of scratch."""
        packed = self._packed
        if packed is not None and packed.takes(x):
            return packed(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        step = max(16, SCRATCH_BYTES // (self.in_features * x.element_size()) // 16 * 16)
        if step >= self.out_features:
            return product(x, self.dense_rows(0, self.out_features, x.dtype), bias)
        out = x.new_empty((*x.shape[:-1], self.out_features))
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            part = None if bias is None else bias[start:stop]
            out[..., start:stop] = product(x, self.dense_rows(start, stop, x.dtype), part)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelLinear:
        """Follow device moves only: casting scales or packed codes would destroy the weight."""

        def move(t: Tensor) -> Tensor:
            return t.to(fn(t.new_empty(0)).device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._call = self.bind()
        return self

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_call": None, "_packed": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy has buffers of its own: bind to those."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._call = self.bind()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


MakeChild = Callable[[StoredLinear, Tensor | None], KernelLinear]


@dataclass(frozen=True)
class Scheme:
    """The three verbs of a scheme; `Any` stands for the scheme's own LinearForm class."""

    pack: Callable[[Any, PackChild], StoredLinear]
    unpack: Callable[[StoredLinear, UnpackChild], LinearForm]
    linear: Callable[[StoredLinear, Tensor | None, torch.dtype, MakeChild], KernelLinear]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, but large float32 products on a CPU through oneDNN.

    Measured on a Zen 5: half the time of MKL's sgemm, after 25 µs more to set up.
    """
    large = x.numel() * weight.shape[0] > ONEDNN_GRAIN
    if large and x.is_cpu and x.dtype == torch.float32 and torch._C._has_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def expect(tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Kernels trust their pointers: a storage tensor of another shape must not reach them.

    Raises:
        ValueError: not this shape, not one of the dtypes, or not contiguous.
    """
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        raise ValueError(
            f"storage tensor {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtypes}"
        )


def nested(stored: StoredLinear, prefix: str) -> StoredLinear:
    """The child stored under `prefix.` inside a nested form."""
    head = prefix + "."
    return StoredLinear(
        scheme=str(stored.meta[head + "scheme"]),
        layout=str(stored.meta[head + "layout"]),
        meta={k[len(head) :]: v for k, v in stored.meta.items() if k.startswith(head)},
        tensors={k[len(head) :]: v for k, v in stored.tensors.items() if k.startswith(head)},
    )


def nest(parent: StoredLinear, **children: StoredLinear) -> StoredLinear:
    """`parent` with each child's meta and tensors added under its name and a dot."""
    meta, tensors = dict(parent.meta), dict(parent.tensors)
    for name, child in children.items():
        inner = {"scheme": child.scheme, "layout": child.layout, **child.meta}
        meta |= {f"{name}.{key}": value for key, value in inner.items()}
        tensors |= {f"{name}.{key}": value for key, value in child.tensors.items()}
    return StoredLinear(parent.scheme, parent.layout, meta, tensors)
