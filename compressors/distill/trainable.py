"""Compressed forms with values that can be trained, and back: the constraint is kept by the form.

A pruned weight has no parameter, so it stays zero; low-rank factors are trained as factors; codes
stay as they are and their grids move, as in the second phase of EfficientQAT (arXiv:2407.11062,
section 3.3) and PEQA (arXiv:2305.14152, eq. 3). Pure tensors; knows no model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressors.tensor import Dense, Grouped, LinearForm, LowRank


class TrainedWeight(nn.Module):
    """The weight of one linear [N, K], computed from trained parameters."""

    @abstractmethod
    def weight(self) -> Tensor:
        """float32 [N, K], differentiable in the parameters."""

    @abstractmethod
    def form(self) -> LinearForm:
        """The weight as it is now, in the form that it was made of."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        return F.linear(x, self.weight())


class TrainedDense(TrainedWeight):
    """A plain weight (a factor, or the kept values of a sparse layer)."""

    def __init__(self, form: Dense) -> None:
        super().__init__()
        self.values = nn.Parameter(form.weight.detach().float().clone())

    def weight(self) -> Tensor:
        return self.values

    def form(self) -> Dense:
        return Dense(self.values.detach().clone())


class TrainedGrouped(TrainedWeight):
    """Fixed codes on grids that move: scale by a gain, zero point by a shift in code units.

    Relative parameters let one learning rate fit every layer. Symmetric codes keep their zero.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None

    def __init__(self, form: Grouped) -> None:
        super().__init__()
        self.bits, self.group = form.bits, form.group
        self.register_buffer("codes", form.codes)
        self.register_buffer("scales", form.scales.detach().float())
        self.register_buffer("zeros", form.zeros.detach().float())
        self.register_buffer("perm", form.perm)
        self.gain = nn.Parameter(torch.ones_like(self.scales))
        self.shift = None if form.symmetric else nn.Parameter(torch.zeros_like(self.zeros))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros as they are now, each [N, G]."""
        zeros = self.zeros if self.shift is None else self.zeros + self.shift
        return self.scales * self.gain, zeros

    def weight(self) -> Tensor:
        scales, zeros = self.grid()
        index = None if self.perm is None else self.perm.long()
        return dequantize(self.codes, scales, zeros, group=self.group, index=index)

    def form(self) -> Grouped:
        scales, zeros = (t.detach().clone() for t in self.grid())
        return Grouped(self.codes, scales, zeros, self.bits, self.group, self.perm)


class TrainedLowRank(TrainedWeight):
    """Two factors, one after the other."""

    def __init__(self, left: TrainedWeight, right: TrainedWeight) -> None:
        super().__init__()
        self.left, self.right = left, right

    def weight(self) -> Tensor:
        return self.left.weight() @ self.right.weight()

    def form(self) -> LowRank:
        return LowRank(self.left.form(), self.right.form())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.left(self.right(x))
        return out


class TrainedAround(TrainedWeight):
    """Any form that wraps others: what it wraps is trained, the rest of it (an index, a sign) is
    kept. Its own `dense` says what it means, on whatever the inner weights have become."""

    def __init__(self, outer: LinearForm, inner: dict[str, TrainedWeight]) -> None:
        super().__init__()
        self.outer = outer
        self._names = tuple(inner)
        self.inner = nn.ModuleList(inner.values())  # not by name: a field may be called `values`

    def _with(self, parts: Mapping[str, LinearForm]) -> LinearForm:
        return replace(self.outer, **parts)  # type: ignore[type-var]

    def _apply(self, fn: Any, recurse: bool = True) -> TrainedAround:
        self.outer = _mapped(self.outer, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _inside(self) -> Iterator[tuple[str, TrainedWeight]]:
        for name, module in zip(self._names, self.inner, strict=True):
            assert isinstance(module, TrainedWeight)
            yield name, module

    def weight(self) -> Tensor:
        return self._with({n: Dense(m.weight()) for n, m in self._inside()}).dense(torch.float32)

    def form(self) -> LinearForm:
        return self._with({name: module.form() for name, module in self._inside()})


def trained(form: LinearForm) -> TrainedWeight:
    """`form` with its values as parameters.

    Raises:
        ValueError: a form that has nothing to train.
    """
    if isinstance(form, Dense):
        return TrainedDense(form)
    if isinstance(form, Grouped):
        return TrainedGrouped(form)
    if isinstance(form, LowRank):
        return TrainedLowRank(trained(form.left), trained(form.right))
    parts = {f.name: getattr(form, f.name) for f in fields(form)}  # type: ignore[arg-type]
    inner = {name: trained(part) for name, part in parts.items() if isinstance(part, LinearForm)}
    if not inner:
        raise ValueError(f"{form.scheme} weights cannot be trained")
    return TrainedAround(form, inner)


def moved(form: LinearForm, device: torch.device | str) -> LinearForm:
    """`form` with its tensors on `device`."""
    return _mapped(form, lambda tensor: tensor.to(device))


def _mapped(form: LinearForm, fn: Callable[[Tensor], Tensor]) -> LinearForm:
    """`form` with `fn` applied to every tensor in it, and in what it wraps."""
    parts: dict[str, Any] = {}
    for item in fields(form):  # type: ignore[arg-type]
        value = getattr(form, item.name)
        if isinstance(value, Tensor):
            parts[item.name] = fn(value)
        elif isinstance(value, LinearForm):
            parts[item.name] = _mapped(value, fn)
    return replace(form, **parts)  # type: ignore[type-var]


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, *, group: int, index: Tensor | None = None
) -> Tensor:
    """`scales · (codes − zeros)` per group: codes [N, K], scales and zeros [N, G] → float [N, K].

    `index` int64 [K] is the group of every column where that is not `k // group`. Whole groups go
    by shape: the gradient of a gather would cost more than the matrix product.
    """
    n, k = codes.shape
    if index is None and k % group == 0:
        grouped = codes.view(n, k // group, group).to(scales.dtype)
        return ((grouped - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(n, k)
    if index is None:
        index = torch.arange(k, device=codes.device) // group
    wide, zero = scales.index_select(1, index), zeros.index_select(1, index)
    return (codes.to(scales.dtype) - zero) * wide
