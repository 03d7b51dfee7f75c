"""Linears of a step as native operations: plain ones, and those made of several parts.

A layer that has no native kernel, or is faster through torch for so many rows, is called as it is
on a view of the buffers. Knows nothing of attention or of the order of a model's parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gateway.engine.kernels.corrected import CorrectedLinear
from gateway.engine.kernels.lowrank import LowRankLinear
from gateway.engine.kernels.native import NativeCall
from gateway.engine.kernels.outlier import OutlierLinear
from gateway.engine.kernels.rotated import RotatedLinear
from gateway.engine.kernels.scaled import ScaledLinear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.native_step import (
    Add,
    Buffers,
    Linear,
    Mix,
    Pick,
    Program,
    Scale,
    Step,
    rows_of,
)

FULL, HALF = torch.float32, torch.bfloat16
DTYPES = (FULL, HALF)
UNLIMITED = 1 << 30  # rows

# The parts of a layer that native operations put together.
_PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    ScaledLinear: ("form",),
    RotatedLinear: ("form",),
    LowRankLinear: ("right", "left"),
    CorrectedLinear: ("base", "correction"),
    OutlierLinear: ("rest", "values"),
}


@dataclass(frozen=True, slots=True)
class Wide:
    """Rows of activations, flat, in the forms that somebody reads: float32, bf16 or both."""

    width: int
    forms: dict[torch.dtype, Tensor]

    def address(self, dtype: torch.dtype) -> int | None:
        """Of the form, None where nobody reads it."""
        found = self.forms.get(dtype)
        return None if found is None else found.data_ptr()


def limits(roots: Iterable[nn.Module], dtype: torch.dtype) -> list[int]:
    """Rows up to which some native linear is used, ascending; the last is unlimited."""
    found = {UNLIMITED}
    if dtype is HALF:
        found |= {call.max_rows for call in _calls(roots) if call.max_rows < UNLIMITED}
    return sorted(found)


def _calls(roots: Iterable[nn.Module]) -> Iterator[NativeCall]:
    for root in roots:
        for module in root.modules():
            if isinstance(module, KernelLinear) and module.native is not None:
                yield module.native


class Linears:
    """Appends linears to a program for steps of at most `most` rows, over one set of buffers.

    Args:
        dtype: of the model's activations where torch computes.
    """

    def __init__(self, program: Program, buffers: Buffers, dtype: torch.dtype, most: int) -> None:
        self.program, self.buffers = program, buffers
        self._dtype, self._most, self._depth = dtype, most, 0

    def address(self, tensor: Tensor, dtype: torch.dtype = FULL) -> int:
        """Of a copy in `dtype` that lives as long as the program."""
        copy = tensor.detach().to(dtype).contiguous()
        self.program.keep([copy])
        return copy.data_ptr()

    def forms(self, name: str, width: int, dtypes: set[torch.dtype]) -> Wide:
        """Buffers for the asked forms."""
        return Wide(width, {d: self.buffers.get(name, width, d) for d in dtypes})

    def native(self, module: nn.Module) -> NativeCall | None:
        """The kernel that is to compute a whole layer, None where there is none."""
        call = module.native if isinstance(module, KernelLinear) else None
        limited = call is not None and self._dtype is HALF and self._most > call.max_rows
        return None if limited else call

    def wants(self, *modules: nn.Module) -> set[torch.dtype]:
        """In which forms linears read their input."""
        found = set[torch.dtype]()
        for module in modules:
            call = self.native(module)
            if call is not None:
                found.add(HALF if call.bf16_input else FULL)
            elif not self._whole(module):
                found.add(self._dtype)
            elif isinstance(module, LowRankLinear):
                found |= self.wants(module.right)
            elif isinstance(module, CorrectedLinear):
                found |= self.wants(module.base, module.correction)
            elif isinstance(module, OutlierLinear):
                found |= self.wants(module.rest) | {FULL}
            else:
                found.add(FULL)
        return found

    def _whole(self, module: nn.Module) -> bool:
        """Whether native operations compute all of a layer."""
        names = _PARTS.get(type(module))
        if names is None:
            return self.native(module) is not None
        return all(self._whole(getattr(module, name)) for name in names)

    def linear(self, module: Any, x: Wide, out: Tensor) -> None:
        """`out` [rows, N] = the layer of x, which has the forms that the layer wants."""
        call = self.native(module)
        if call is not None:
            self.product(call, x, out)
            return
        if not self._whole(module):
            self.module(module, x, out)
            return
        self._depth += 1  # layers within layers have buffers of their own
        if isinstance(module, LowRankLinear):
            self._pair(module, x, out)
        elif isinstance(module, CorrectedLinear):
            self.linear(module.base, x, out)
            self._more(module.correction, x, out)
        elif isinstance(module, OutlierLinear):
            self.linear(module.rest, x, out)
            self._more(module.values, self._picked(module, x), out)
        elif isinstance(module, RotatedLinear):
            self.linear(module.form, self._mixed(module, x), out)
        else:
            assert isinstance(module, ScaledLinear)
            self.linear(module.form, self._scaled(x, module.scale, self.wants(module.form)), out)
        self._depth -= 1

    def product(self, call: NativeCall, x: Wide, out: Tensor | None, kept: bool = False) -> Linear:
        """One kernel; its arguments, for an `out` that changes from step to step."""
        args = Linear(
            run=call.entry,
            weight=call.address,
            x=x.address(HALF if call.bf16_input else FULL),
            out=None if out is None else out.data_ptr(),
            kept=kept,
        )
        self.program.add(args)
        return args

    def module(self, module: nn.Module, x: Wide, out: Tensor) -> None:
        """A layer through its own code."""
        source, width = x.forms[self._dtype], x.width

        def run(step: Step) -> None:
            found = module(rows_of(source, step.rows, width)[None])[0]
            rows_of(out, step.rows, found.shape[-1]).copy_(found)

        self.program.call(run)

    def _named(self, name: str) -> str:
        return f"{name} {self._depth}"

    def _pair(self, module: LowRankLinear, x: Wide, out: Tensor) -> None:
        between = self.buffers.get(self._named("rank"), module.right.out_features)
        self.linear(module.right, x, between)
        inner, wanted = Wide(module.right.out_features, {FULL: between}), self.wants(module.left)
        if HALF in wanted:
            inner = self._scaled(inner, None, wanted)
        self.linear(module.left, inner, out)

    def _more(self, module: nn.Module, x: Wide, out: Tensor) -> None:
        """`out` += the layer of x."""
        width = int(getattr(module, "out_features", 0))
        more = self.buffers.get(self._named("more"), width)
        self.linear(module, x, more)
        self.program.add(Add(x=out.data_ptr(), add=more.data_ptr(), n=width))

    def _scaled(self, x: Wide, by: Tensor | None, dtypes: set[torch.dtype]) -> Wide:
        """x · by (None: 1)."""
        out = self.forms(self._named("scaled"), x.width, dtypes)
        self.program.add(
            Scale(
                x=x.address(FULL),
                by=None if by is None else self.address(by),
                full=out.address(FULL),
                half=out.address(HALF),
                n=x.width,
                kept=0,
            )
        )
        return out

    def _mixed(self, module: RotatedLinear, x: Wide) -> Wide:
        out = self.forms(self._named("mixed"), x.width, self.wants(module.form) | {FULL})
        self.program.add(
            Mix(
                x=x.address(FULL),
                signs=self.address(module.signs),
                full=out.address(FULL),
                half=out.address(HALF),
                n=x.width,
                block=module.block,
            )
        )
        return out

    def _picked(self, module: OutlierLinear, x: Wide) -> Wide:
        count = module.columns.numel()
        out = self.forms(self._named("picked"), count, self.wants(module.values))
        self.program.add(
            Pick(
                x=x.address(FULL),
                columns=self.address(module.columns, torch.int32),
                full=out.address(FULL),
                half=out.address(HALF),
                k=x.width,
                n=count,
            )
        )
        return out
