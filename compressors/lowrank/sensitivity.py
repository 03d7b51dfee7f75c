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
from itertools import pairwise

import torch
from torch import Tensor

from compressors import gram as grams
from compressors.gram import Gram
from compressors.lowrank.svd import rank_of

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
    curves = [_curve(values, shape) for values, shape in zip(losses, shapes, strict=True)]
    chosen = [curve[0][0] for curve in curves]
    left -= sum(curve[0][0] * (n + k) for curve, (n, k) in zip(curves, shapes, strict=True))
    steps = [
        ((before[1] - after[1]) / (after[2] - before[2]), layer, before, after)
        for layer, curve in enumerate(curves)
        for before, after in pairwise(curve)
    ]
    # Along one convex curve the gain per parameter only falls: sorting keeps the order of steps.
    for _, layer, before, after in sorted(steps, key=lambda step: -step[0]):
        if chosen[layer] == before[0] and after[2] - before[2] <= left:
            chosen[layer] = after[0]
            left -= after[2] - before[2]
    return [
        None if rank == _whole(shape) else rank for rank, shape in zip(chosen, shapes, strict=True)
    ]


def _whole(shape: Shape) -> int:
    """Stands for the rank of a layer that is left as it is."""
    return min(shape) + 1


def _curve(losses: Tensor, shape: Shape) -> list[tuple[int, float, int]]:
    """(rank, loss, parameters) at the corners of the convex hull below the points of all ranks."""
    n, k = shape
    unit = _UNIT if min(n, k) >= _SMALL else 1
    tail = [*losses.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    ranks = range(unit, rank_of(n, k, 100) + 1, unit) or range(1, 2)
    points = [(rank, tail[rank], rank * (n + k)) for rank in ranks if rank * (n + k) < n * k]
    hull: list[tuple[int, float, int]] = []
    for point in [*points, (_whole(shape), 0.0, n * k)]:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(
    first: tuple[int, float, int], middle: tuple[int, float, int], last: tuple[int, float, int]
) -> bool:
    """`middle` lies on or above the line from `first` to `last`."""
    rise = (last[1] - first[1]) * (middle[2] - first[2])
    return (middle[1] - first[1]) * (last[2] - first[2]) >= rise
