"""Random layers with correlated inputs, and the plainest grid, written from its equations."""

from __future__ import annotations

import torch
from torch import Tensor

from compressors import gram
from compressors.gram import Gram
from compressors.tensor import LinearForm


def draw(seed: int, n: int = 24, k: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and correlated inputs [tokens, k] with uneven column energy."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + 0.3 * torch.eye(k)
    scale = torch.rand(k, generator=generator) + 0.05
    x = torch.randn(tokens, k, generator=generator) @ mix * scale
    return torch.randn(n, k, generator=generator), x


def statistic(x: Tensor) -> Gram:
    result = gram.empty(x.shape[1])
    for part in torch.split(x, 64):
        gram.accumulate(result, part)
    return result


def output_error(weight: Tensor, form: LinearForm, x: Tensor) -> float:
    return float(((weight - form.dense()) @ x.t()).square().sum())


def naive_grid(values: list[float], bits: int) -> tuple[float, int]:
    lo, hi = min(0.0, *values), max(0.0, *values)
    scale = float(torch.tensor((hi - lo) / (2**bits - 1)).half()) or 1.0
    return scale, min(max(round(-lo / scale), 0), 2**bits - 1)
