"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): quantize column by column, repair with the rest.

With H = XXᵀ + λI of the layer's inputs and U the upper Cholesky factor of H⁻¹, for each column j
(algorithm 1; eqs. 2 and 3 with the inverse read off U):

    e = (w_j − quant(w_j)) / U_jj,     W_:,j+1: ← W_:,j+1: − e · U_j,j+1:

Updates beyond a block of columns are applied once per block (section 3.2, lazy batches). Columns go
by falling input energy, the diagonal of H. Grids are made beforehand (the authors'
`--static-groups`), so that every column keeps its natural group and kernels need no permutation;
with `act_order` groups are of columns in the order of the sweep instead and their grids are fitted
when the sweep reaches them (the authors' `--act-order`). Pure tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressors import gram as grams
from compressors.gram import Gram, accumulate, empty
from compressors.quantize import rtn
from compressors.tensor import Grouped

__all__ = ["Settings", "accumulate", "empty", "solve"]

_Grid = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the sweep runs; the defaults are what levels are made with.

    Attributes:
        damping: λ as a share of H's mean diagonal; raised until H factors.
        block: columns between two updates of all that follow. Changes time, not results.
        by_energy: columns of large inputs first; else as they stand.
        search: fit each grid's range to its weights, an error counted by its column's energy; else
            it spans them, as round-to-nearest does.
    """

    damping: float = 0.01
    block: int = 128
    by_energy: bool = True
    search: bool = True


_DEFAULTS = Settings()


def solve(
    weight: Tensor,
    statistic: Gram,
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    act_order: bool = False,
    mask: Tensor | None = None,
    grid: _Grid | None = None,
    settings: Settings = _DEFAULTS,
) -> Grouped:
    """Quantize weight [N, K] (float32) for inputs with the given statistic.

    Args:
        group: columns per grid; the last group may be short.
        act_order: groups are of columns with like energy; the form carries the permutation. Not
            with a `mask` or a `grid`, whose groups are given.
        mask: bool [N, K], equally many True in every row; where False the weight becomes zero and
            its loss is repaired like any rounding error (the joint case of SparseGPT,
            arXiv:2301.00774). Groups then run over the kept weights of a row, and the form is of
            these, [N, kept].
        grid: scales and zeros [N, G] to use instead of grids of its own.

    Raises:
        ValueError: the statistic is not finite.
    """
    by_energy = settings.by_energy or act_order
    factor, order = grams.factor_in_order(statistic, settings.damping, by_energy)
    # Transposed, so that a column of the layer is contiguous.
    work = weight.t()[order].contiguous()
    place = torch.argsort(order)
    energy = statistic.matrix.diagonal()
    if act_order and mask is None and grid is None and group < len(order):
        sweep = _Sweep(work, factor, bits, None)
        grids = sweep.grow(_Growing(group, symmetric, settings, energy[order]))
        scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
        codes = sweep.codes[place].t().contiguous()
        return Grouped(codes, scales, zeros, bits, group, (place // group).to(torch.int32))
    if grid is None:
        counts = _kept(energy[None], mask) if settings.search else None
        grid = _own_grid(_kept(weight, mask), counts, bits, group, symmetric)
    scales, zeros = grid
    sweep = _Sweep(work, factor, bits, None if mask is None else mask.t()[order].contiguous())
    s, z = (_by_column(part, group, mask, order) for part in (scales, zeros))
    for block in _pieces(0, len(order), settings.block):
        sweep.columns(block, s[block], z[block])
    codes = _kept(sweep.codes[place].t().contiguous(), mask)
    return Grouped(codes, scales, zeros, bits, group)


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """What `mask` keeps of values [N or 1, K], as [N, kept]; the values themselves without one."""
    return values if mask is None else values.expand(mask.shape)[mask].view(len(mask), -1)


def _own_grid(
    weight: Tensor, counts: Tensor | None, bits: int, group: int, symmetric: bool
) -> _Grid:
    """Grids fitted to weight [N, k], whose errors count as `counts` say; spanning it without."""
    if counts is None:
        return rtn.grid(*rtn.group_range(weight, group), bits, symmetric)
    return rtn.fitted_grid(weight, bits, group, symmetric, counts)


def _by_column(grid: Tensor, group: int, mask: Tensor | None, order: Tensor) -> Tensor:
    """Scales or zeros [N, G] of every weight, transposed and in `order`: [K, N]."""
    if mask is None:
        return grid.t()[order // group].contiguous()
    index = mask.cumsum(1).sub_(1).clamp_(min=0).div_(group, rounding_mode="floor")
    return grid.gather(1, index).t()[order].contiguous()


def _pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


@dataclass(frozen=True)
class _Growing:
    """Grids that are made when the sweep reaches their group, from the weights as repaired."""

    group: int
    symmetric: bool
    settings: Settings
    energy: Tensor  # [K], in the order of the sweep


class _Sweep:
    """Columns on their way: `work` [K, N] float32, changed in place; `codes` uint8 [K, N]."""

    def __init__(self, work: Tensor, factor: Tensor, bits: int, keep: Tensor | None) -> None:
        self.work, self.factor, self.keep = work, factor, keep
        self.bits, self.top = bits, 2**bits - 1
        self.codes = torch.empty_like(work, dtype=torch.uint8)
        self._diagonal = factor.diagonal().tolist()

    def columns(self, block: slice, scales: Tensor, zeros: Tensor) -> None:
        """Quantize columns `block` on grids [block, N]; repair all that follow."""
        work, end = self.work, block.stop
        codes, errors = (torch.empty_like(work[block]) for _ in range(2))
        for i, j in enumerate(range(block.start, end)):
            column, code, error = work[j], codes[i], errors[i]
            torch.div(column, scales[i], out=code)
            code.add_(zeros[i]).round_().clamp_(0, self.top)
            torch.sub(code, zeros[i], out=error)
            error.mul_(scales[i])
            if self.keep is not None:
                error.mul_(self.keep[j])
            torch.sub(column, error, out=error)
            error.div_(self._diagonal[j])
            work[j + 1 : end].addr_(self.factor[j, j + 1 : end], error, alpha=-1.0)
        self.codes[block] = codes.to(torch.uint8)
        work[end:].addmm_(self.factor[block, end:].t(), errors, alpha=-1.0)

    def grow(self, rules: _Growing) -> list[_Grid]:
        """Quantize all columns group by group; scales and zeros [N, 1] of every group."""
        grids = []
        for group in _pieces(0, len(self.work), rules.group):
            now = self.work[group].t().contiguous()
            if rules.settings.search:
                counts = rules.energy[group][None]
                grid = rtn.fitted_grid(now, self.bits, rules.group, rules.symmetric, counts)
            else:
                grid = rtn.grid(*rtn.group_range(now, rules.group), self.bits, rules.symmetric)
            grids.append(grid)
            for block in _pieces(group.start, group.stop, rules.settings.block):
                s, z = (part.t().expand(block.stop - block.start, -1) for part in grid)
                self.columns(block, s, z)
        return grids
