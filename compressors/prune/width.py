"""Width pruning: attention heads and MLP channels removed, what reads them re-fitted.

A *unit* is what goes or stays as one: a channel, or the heads that share keys and values (LLM-
Pruner's coupled structures, Ma et al. 2023, arXiv:2305.11627, section 3.1). It is seen from its
consumer, the linear that reads it (`o_proj`, `down_proj`): with inputs x of second moment G and
weight W [N, K], the best weight on the columns S that stay is the least-squares one,

    W' = W G_:S (G_SS)⁻¹,   and removing unit u from it then costs   tr(W_u ((G⁻¹)_uu)⁻¹ W_uᵀ)

(ZipLM, Kurtic et al. 2023, arXiv:2302.04089, eqs. 2 to 4: the optimal brain surgeon for whole
structures). Units go in rounds, the cheapest first, and W and G⁻¹ follow, so that of two units that
say the same only one goes. Where the consumer has a bias, G is the covariance and the bias makes
good the mean of what is gone (FLAP, An et al. 2023, arXiv:2312.11983, eq. 5). Pure tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 32  # in which the units go; a round's are judged together
_EXACT_COLUMNS = 8192  # up to here in float64, beyond in half the memory
# Share of the mean diagonal that is added to it.
_DAMPING = {torch.float64: 1e-7, torch.float32: 1e-4}


@dataclass
class Moments:
    """Running means over tokens: `square` of xxᵀ, float32 [K, K]; `mean` of x [K]."""

    square: Tensor
    mean: Tensor
    tokens: int = 0


@dataclass(frozen=True)
class Cut:
    """What stays of a consumer.

    Attributes:
        units: int64, ascending, the units that stay.
        weight: float32 [N, kept columns], re-fitted.
        shift: float32 [N], to add to the bias; None without one.
    """

    units: Tensor
    weight: Tensor
    shift: Tensor | None


def empty(in_features: int, device: torch.device | str = "cpu") -> Moments:
    """A statistic that has seen nothing."""
    square = torch.zeros(in_features, in_features, device=device)
    return Moments(square, torch.zeros(in_features, device=device))


def accumulate(moments: Moments, x: Tensor) -> None:
    """Add the rows of x [..., K], any float dtype, in place."""
    rows = x.reshape(-1, x.shape[-1]).float()
    total = moments.tokens + rows.shape[0]
    if not total:
        return
    kept = moments.tokens / total
    moments.square.mul_(kept).addmm_(rows.t(), rows, alpha=1.0 / total)
    moments.mean.mul_(kept).add_(rows.sum(0), alpha=1.0 / total)
    moments.tokens = total


def solve(weight: Tensor, statistic: Moments, *, unit: int, kept: int, biased: bool) -> Cut:
    """Keep `kept` units of `unit` neighbouring columns of weight [N, K] (float32).

    Args:
        biased: the layer has a bias, which may change.

    Raises:
        ValueError: the statistic is not finite.
    """
    if not bool(torch.isfinite(statistic.square).all()):
        raise ValueError("the calibration inputs are not finite")
    dtype = torch.float64 if weight.shape[1] <= _EXACT_COLUMNS else torch.float32
    w, mean = weight.to(dtype), statistic.mean.to(dtype)
    moment = statistic.square.to(dtype)
    if biased:
        moment = moment - torch.outer(mean, mean)
    level = float(moment.diagonal().mean()) * _DAMPING[dtype]
    # Columns that no token used stay next to free to remove.
    moment.diagonal().add_(level if level > 0 else 1.0)
    units = choose(w, moment, unit=unit, kept=kept)
    columns = columns_of(units, unit)
    inner = torch.linalg.cholesky(moment[columns][:, columns])
    fitted = torch.cholesky_solve(moment[columns] @ w.t(), inner).t()
    shift = (w @ mean - fitted @ mean[columns]).float() if biased else None
    return Cut(units, fitted.float().contiguous(), shift)


def choose(weight: Tensor, moment: Tensor, *, unit: int, kept: int) -> Tensor:
    """The units to keep, ascending; weight [N, K], moment [K, K] positive definite."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    alive = torch.arange(weight.shape[1] // unit, device=weight.device)
    at_once = math.ceil((len(alive) - kept) / _ROUNDS)
    while len(alive) > kept:
        cost = removal_cost(weight, inverse, unit)
        order = torch.argsort(cost, stable=True)
        out = order[: min(at_once, len(alive) - kept)]
        stay = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        stay[out] = False
        gone, left = columns_of(out, unit), columns_of(stay.nonzero().flatten(), unit)
        pull = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, left])
        weight = weight[:, left] - weight[:, gone] @ pull
        inverse = inverse[left][:, left] - inverse[left][:, gone] @ pull
        alive = alive[stay]
    return alive


def removal_cost(weight: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """tr(W_u ((G⁻¹)_uu)⁻¹ W_uᵀ) of every unit; weight [N, K], inverse = G⁻¹ [K, K]."""
    count = weight.shape[1] // unit
    if unit == 1:
        return weight.square().sum(0).div_(inverse.diagonal())
    index = torch.arange(count, device=weight.device)
    blocks = inverse.view(count, unit, count, unit)[index, :, index]
    mine = weight.view(-1, count, unit).permute(1, 2, 0)
    cost: Tensor = (mine * torch.linalg.solve(blocks, mine)).sum((1, 2))
    return cost


def columns_of(units: Tensor, unit: int) -> Tensor:
    """The columns of units, each `unit` neighbours."""
    inside = torch.arange(unit, device=units.device)
    return (units[:, None] * unit + inside).flatten()
