"""Compressed layers of one input as one layer: their rows below each other, computed in one launch.

On a GPU only, where a launch of few rows costs as much as its bytes. The joined tensors replace the
layers' own, which become views, so nothing is held twice and each layer still computes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gateway.engine.kernels.float8 import Float8Linear
from gateway.engine.kernels.grouped import BLOCK, GroupedLinear
from gateway.engine.kernels.int8 import Int8Linear
from gateway.engine.kernels.nested import NestedLinear
from gateway.engine.kernels.on_cuda import PackedCall
from gateway.engine.kernels.scaled import ScaledLinear
from gateway.engine.kernels.scheme import KernelLinear

_SHARED = frozenset({"columns", "inputs", "scale"})  # one per column: must be the same for all


def join(modules: Sequence[nn.Module]) -> KernelLinear | None:
    """`whole(x)` is `torch.cat([module(x) for module in modules], -1)`; None where it cannot be.

    Moves the modules' tensors together; call it before anything else keeps pointers into them.
    """
    layers = [module for module in modules if isinstance(module, KernelLinear)]
    if len(layers) != len(modules) or not _alike(layers):
        return None
    return _join(layers)


def one_token(module: nn.Module | None) -> PackedCall | None:
    """What computes this layer for one token in digits, whole; None where nothing does."""
    if not isinstance(module, GroupedLinear | NestedLinear):
        return None
    packed = module._packed
    return packed if packed is not None and packed.group else None


def _join(layers: Sequence[KernelLinear]) -> KernelLinear:
    whole = copy.copy(layers[0])
    whole._buffers, whole._modules = dict(whole._buffers), dict(whole._modules)
    whole.out_features = sum(layer.out_features for layer in layers)
    _align(layers, whole)
    for name, first in layers[0]._buffers.items():
        if first is None or name in _SHARED:
            continue
        parts = [layer.get_buffer(name) for layer in layers]
        together = torch.cat(parts)
        whole._buffers[name] = together
        split = torch.split(together, [len(part) for part in parts])
        for layer, part in zip(layers, split, strict=True):
            layer._buffers[name] = part
    for name, child in layers[0].named_children():
        assert isinstance(child, KernelLinear)
        whole._modules[name] = _join([_child(layer, name) for layer in layers])
    for layer in (*layers, whole):
        layer._call = layer.bind()
    return whole


def _align(layers: Sequence[KernelLinear], whole: KernelLinear) -> None:
    """Bring grouped layers to one exponent of their scales; `_exact` made sure that it is exact."""
    if not isinstance(whole, GroupedLinear):
        return
    grouped = [layer for layer in layers if isinstance(layer, GroupedLinear)]
    top = max(layer.exponent for layer in grouped)
    for layer in grouped:
        layer.scales = _shifted(layer.scales, layer.exponent - top)
        layer.exponent = top
    whole.exponent = top


def _shifted(scales: Tensor, by: int) -> Tensor:
    return scales if not by else (scales.float() * 2.0**by).half()


def _exact(layers: Sequence[GroupedLinear]) -> bool:
    top = max(layer.exponent for layer in layers)
    return all(
        torch.equal(_shifted(_shifted(layer.scales, by), -by), layer.scales)
        for layer in layers
        if (by := layer.exponent - top)
    )


def _alike(layers: Sequence[KernelLinear]) -> bool:
    """Of one supported kind, on a GPU, on the same input, with tensors that differ in rows only."""
    first = layers[0]
    kinds = (GroupedLinear, Int8Linear, Float8Linear, NestedLinear, ScaledLinear)
    if type(first) not in kinds or any(type(layer) is not type(first) for layer in layers):
        return False
    # Blocks of rows must not be cut.
    if any(layer.out_features % BLOCK for layer in layers):
        return False
    if any(layer.in_features != first.in_features for layer in layers):
        return False
    if not all(_same_columns(first, layer) for layer in layers):
        return False
    grouped = [layer for layer in layers if isinstance(layer, GroupedLinear)]
    if grouped and not (_one_format(grouped) and _exact(grouped)):
        return False
    return all(
        _alike([_child(layer, name) for layer in layers]) for name, _ in first.named_children()
    )


def _one_format(layers: Sequence[GroupedLinear]) -> bool:
    return len({(layer.bits, layer.width, layer.columns is None) for layer in layers}) == 1


def _same_columns(one: KernelLinear, other: KernelLinear) -> bool:
    """Equal tensors per column; the others of one type, equally long rows, on a GPU."""
    for name, a in one._buffers.items():
        b = other._buffers.get(name)
        if a is None or b is None:
            if a is not b:
                return False
        elif name in _SHARED:
            if not torch.equal(a, b):
                return False
        elif a.dtype != b.dtype or a.shape[1:] != b.shape[1:] or not (a.is_cuda and b.is_cuda):
            return False
    return True


def _child(layer: KernelLinear, name: str) -> KernelLinear:
    child = layer.get_submodule(name)
    assert isinstance(child, KernelLinear)
    return child
