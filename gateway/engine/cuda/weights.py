"""A decoder's linears: those that read the same rows as one product, one row by kernels of ours.

Dense weights that can lie together are moved into one tensor of which the modules keep views, so
nothing is doubled and whoever else runs the modules computes the same. Compressed linears of one
format likewise (`kernels.joined`); others are called as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateway.engine.cuda import digits
from gateway.engine.cuda.kernels import gated
from gateway.engine.cuda.matvec import gated_matvec, matvec
from gateway.engine.decoder import GatedMlp
from gateway.engine.kernels.joined import join, one_token
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.triton_digits import Digits, Heads


class Single:
    """`single(x)` is `module(x)`; one row of a dense weight by a kernel of ours.

    Attributes:
        group: of the digits that it takes for one row; 0: it takes numbers only.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._dense = module if type(module) is nn.Linear else None
        self._one = one_token(module)
        self.group = 0 if self._one is None else self._one.group

    def __call__(self, x: Tensor | Digits) -> Tensor:
        if isinstance(x, Digits):
            assert self._one is not None, "digits are made for a layer that takes them"
            return self._one.one(x)
        if self._dense is not None and x.shape[0] == 1:
            return matvec(x, self._dense.weight, self._dense.bias)
        out: Tensor = self._module(x)
        return out


class Joined:
    """`joined(x)` is `[module(x) for module in modules]`; results may be views of one tensor.

    Attributes:
        group: as `Single.group`.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._sizes: list[int] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._whole: KernelLinear | None = None
        linears = [module for module in modules if type(module) is nn.Linear]
        if len(linears) == len(self._modules) and _alike(linears):
            self.weight = _together(linears)
            self._sizes = [linear.out_features for linear in linears]
            if linears[0].bias is not None:
                self.bias = torch.cat([linear.bias.detach() for linear in linears])
        elif not linears:
            self._whole = join(self._modules)
            self._sizes = [int(getattr(module, "out_features", 0)) for module in self._modules]
        self._one = one_token(self._whole)
        self.group = 0 if self._one is None else self._one.group

    def __call__(self, x: Tensor | Digits) -> Sequence[Tensor]:
        if isinstance(x, Digits):
            assert self._one is not None, "digits are made for a layer that takes them"
            return torch.split(self._one.one(x), self._sizes, -1)
        if self._whole is not None:
            return torch.split(self._whole(x), self._sizes, -1)
        if self.weight is None:
            return [module(x) for module in self._modules]
        product = matvec if x.shape[0] == 1 else F.linear
        return torch.split(product(x, self.weight, self.bias), self._sizes, -1)

    def turned(self, x: Digits, heads: Heads) -> Tensor:
        """Queries of one row [1, heads · dim], turned, where the modules are a query's, a key's
        and a value's and digits are taken; keys and values go to the pool."""
        assert self._one is not None, "digits are made for a layer that takes them"
        return self._one.one(x, heads=heads)


class Gated:
    """`mlp(x)` is down(act(gate(x)) · up(x)) of a gated MLP."""

    def __init__(self, mlp: GatedMlp) -> None:
        self._inner = Joined([mlp.gate, mlp.up])
        self._down = Single(mlp.down)
        self._activation = mlp.activation
        self.group = self._inner.group

    def __call__(self, x: Tensor | Digits) -> Tensor:
        weight, bias = self._inner.weight, self._inner.bias
        if isinstance(x, Tensor) and weight is not None and bias is None and x.shape[0] == 1:
            return self._down(gated_matvec(x, weight, self._activation))
        gate, up = self._inner(x)
        if isinstance(x, Digits) and self._down.group:
            return self._down(digits.gated(gate, up, self._activation, self._down.group))
        return self._down(gated(gate, up, self._activation))


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
