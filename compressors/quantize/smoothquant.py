"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): inputs made even before they are rounded.

    Y = (X diag(s)⁻¹) (diag(s) Wᵀ)            (eq. 3)
    s_j = max|X_j|^α / max|W_j|^(1−α)         (eq. 4)

α (the migration strength) is searched per layer: the one whose W8A8 product is nearest to the exact
one on a sample of the inputs; not to smooth at all is among the candidates. X diag(s)⁻¹ is taken
where the layer rounds its inputs, at no cost, so that it works for every linear and not only for
those behind a norm that could absorb it. Pure tensors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressors.forms.int8 import Int8
from compressors.quantize import w8a8
from compressors.quantize.inputs import Inputs, accumulate, empty

__all__ = ["accumulate", "empty", "smoothing", "solve"]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def solve(
    weight: Tensor,
    statistic: Inputs,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
) -> Int8:
    """Quantize weight [N, K] (float32) for inputs like those of the statistic.

    Raises:
        ValueError: the statistic is not finite.
    """
    if not bool(torch.isfinite(statistic.absmax).all()):
        raise ValueError("the calibration inputs are not finite")
    exact = statistic.sample @ weight.t()

    def error(form: Int8) -> float:
        return float((w8a8.product(statistic.sample, form) - exact).square().sum())

    best = w8a8.solve(weight)
    least = error(best)
    for alpha in ALPHAS:
        s = smoothing(statistic.absmax, weight, alpha)
        form = replace(w8a8.solve(weight * s), inputs=1.0 / s)
        if (found := error(form)) < least:
            best, least = form, found
    return best


def smoothing(absmax: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s [K] of eq. 4, up to a common factor; 1 for columns without an input or without a weight."""
    columns = weight.abs().amax(0)
    used = (absmax > 0) & (columns > 0)
    logs = alpha * absmax.log() - (1 - alpha) * columns.log()
    logs = torch.where(used, logs, torch.zeros_like(logs))
    if bool(used.any()):  # a common factor changes nothing but keeps s in range
        logs = torch.where(used, logs - logs[used].mean(), logs)
    return logs.clamp_(-10, 10).exp()
