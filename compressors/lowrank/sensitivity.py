"""Ranks by sensitivity: how much the model's loss grows with every direction a layer gives up.

SVD-LLM (arXiv:2403.07378) gives every layer the same share of its parameters; SVD-LLM V2
(arXiv:2503.12340) shares them out by each layer's truncation loss, ASVD (arXiv:2312.05821) by the
model's loss when one layer is truncated. Here that loss is taken to second order with a
Kronecker-factored Fisher matrix (K-FAC, arXiv:1503.05671; for low rank arXiv:2505.17974):
H ≈ E[xxᵀ] ⊗ E[ggᵀ], x a layer's inputs and g the gradients at its outputs. With the whitened weight
W S = U Σ Vᵀ (S Sᵀ = E[xxᵀ], as in `svd`) the cost of dropping directions is a sum, because the v_i
are orthonormal:

    ½ tr(G ΔW E[xxᵀ] ΔWᵀ) = ½ Σ_{i dropped} σ_i² u_iᵀ G u_i,     G = E[ggᵀ]

so all layers' directions are on one scale, and the best ranks take the greatest gains per parameter
until the budget is spent. Pure tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from compressors import gram as grams
from compressors.gram import Gram

Shape = tuple[int, int]
_UNIT = 8  # ranks are multiples of this in layers that are large enough: kernels like it
_SMALL = 64  # ranks of smaller layers are free
_DAMPING = 1e-6


def direction_losses(weight: Tensor, inputs: Gram, gradients: Gram) -> Tensor:
    """What dropping each whitened singular direction of weight [N, K] costs, largest σ first.

    Returns:
        float64 [min(N, K)], on the CPU, up to a factor that all layers share.

    Raises:
        ValueError: a statistic is not finite.
    """
    if not bool(torch.isfinite(gradients.matrix).all()):
        raise ValueError("the gradients on the calibration text are not finite")
    whitened = weight.double() @ grams.cholesky(inputs, _DAMPING, torch.float64)
    output = gradients.matrix.double()
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(whitened @ whitened.t())
        scaled = vectors * values.clamp(min=0).sqrt()
    else:
        scaled = whitened @ torch.linalg.eigh(whitened.t() @ whitened).eigenvectors
    losses: Tensor = ((output @ scaled) * scaled).sum(0)
    return losses.clamp(min=0).flip(0).cpu()


def allocate(losses: Sequence[Tensor], shapes: Sequence[Shape], percent: int) -> list[int | None]:
    """Ranks that lose least while all layers together keep `percent` of their parameters.

    A layer for which factors would hold as many parameters as its weight stays whole.

    Args:
        losses: of every layer's directions, from `direction_losses`.

    Returns:
        One rank per layer; None for a layer that stays whole.
    """
    left = sum(n * k for n, k in shapes) * percent // 100
    every = [_points(values, shape) for values, shape in zip(losses, shapes, strict=True)]
    chosen = [points[0] for points in every]
    left -= sum(point.parameters for point in chosen)
    steps = [
        (before.gain(after), layer, before, after)
        for layer, points in enumerate(every)
        for before, after in pairwise(_hull(points))
    ]
    # Along one convex curve the gain per parameter only falls: sorting keeps the order of steps.
    for _, layer, before, after in sorted(steps, key=lambda step: -step[0]):
        cost = after.parameters - before.parameters
        if chosen[layer] is before and cost <= left:
            chosen[layer], left = after, left - cost
    while True:  # what is left is less than a step of the hull: take what fits
        fits = [
            (now.gain(point), layer, point)
            for layer, now in enumerate(chosen)
            for point in every[layer][every[layer].index(now) + 1 :][:1]
            if point.parameters - now.parameters <= left
        ]
        if not fits:
            break
        _, layer, point = max(fits, key=lambda fit: fit[0])
        left -= point.parameters - chosen[layer].parameters
        chosen[layer] = point
    return [point.rank for point in chosen]


@dataclass(frozen=True, slots=True)
class _Point:
    """A choice for one layer: its rank (None: whole), what it loses and what it holds."""

    rank: int | None
    loss: float
    parameters: int

    def gain(self, other: _Point) -> float:
        """Loss saved per parameter by taking `other` instead."""
        return (self.loss - other.loss) / (other.parameters - self.parameters)


def _points(losses: Tensor, shape: Shape) -> list[_Point]:
    """The choices for a layer, smallest first."""
    n, k = shape
    unit = _UNIT if min(n, k) >= _SMALL else 1
    tail = losses.flip(0).cumsum(0).flip(0).tolist()
    most = (n * k - 1) // (n + k)
    points = [_Point(rank, tail[rank], rank * (n + k)) for rank in range(unit, most + 1, unit)]
    return [*points, _Point(None, 0.0, n * k)]


def _hull(points: list[_Point]) -> list[_Point]:
    """The points at the corners of the convex hull below."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) > 1 and hull[-2].gain(hull[-1]) <= hull[-2].gain(point):
            hull.pop()
        hull.append(point)
    return hull
