"""Linears that read the same rows, as one product where their weights can lie together.

Dense weights are moved into one tensor of which the modules keep views, so nothing is doubled and
whoever else runs the modules computes the same. Compressed linears are called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined:
    """`joined(x)` is `[module(x) for module in modules]`; results may be views of one tensor."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._sizes: list[int] = []
        linears = [module for module in modules if type(module) is nn.Linear]
        if len(linears) == len(self._modules) and _alike(linears):
            self._weight = _together(linears)
            self._sizes = [linear.out_features for linear in linears]
            if linears[0].bias is not None:
                self._bias = torch.cat([linear.bias.detach() for linear in linears])

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self._weight is None:
            return [module(x) for module in self._modules]
        return torch.split(F.linear(x, self._weight, self._bias), self._sizes, -1)


def _alike(linears: Sequence[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        linear.weight.dtype == first.weight.dtype
        and linear.weight.device == first.weight.device
        and linear.in_features == first.in_features
        and (linear.bias is None) == (first.bias is None)
        and linear.weight.is_contiguous()
        for linear in linears
    )


def _together(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights below each other, [sum of outputs, inputs]; the linears' are views of it."""
    first = linears[0].weight.detach()
    rows = sum(linear.out_features for linear in linears)
    if _adjacent([linear.weight for linear in linears]):
        return first.as_strided((rows, first.shape[1]), first.stride())
    whole = first.new_empty(rows, first.shape[1])
    parts = torch.split(whole, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        part.copy_(linear.weight.detach())
        linear.weight.data = part
    return whole


def _adjacent(weights: Sequence[Tensor]) -> bool:
    storage = weights[0].untyped_storage().data_ptr()
    return all(
        after.untyped_storage().data_ptr() == storage
        and after.data_ptr() == before.data_ptr() + before.nbytes
        for before, after in pairwise(weights)
    )
