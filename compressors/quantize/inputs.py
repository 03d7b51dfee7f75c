"""What a layer's inputs look like, column by column: the statistic of methods that round them.

Pure tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 64  # sampled of a batch
_KEPT = 512  # sampled rows held


@dataclass
class Inputs:
    """Of all tokens seen: the largest magnitude of every column (`absmax` float32 [K]), the mean
    square over tokens and columns, and a sample of rows, float32 [S, K]."""

    absmax: Tensor
    sample: Tensor
    square: float = 0.0
    tokens: int = 0

    @property
    def rms(self) -> float:
        return math.sqrt(self.square)


def empty(in_features: int, device: torch.device | str = "cpu") -> Inputs:
    """A statistic that has seen nothing."""
    return Inputs(
        torch.zeros(in_features, device=device), torch.zeros(0, in_features, device=device)
    )


def accumulate(inputs: Inputs, x: Tensor) -> None:
    """Add the rows of x [..., K], any float dtype, in place."""
    rows = x.reshape(-1, x.shape[-1]).float()
    total = inputs.tokens + rows.shape[0]
    if not total:
        return
    torch.maximum(inputs.absmax, rows.abs().amax(0), out=inputs.absmax)
    mean = float(rows.square().mean())
    inputs.square += (mean - inputs.square) * rows.shape[0] / total
    inputs.tokens = total
    picked = rows[:: max(1, rows.shape[0] // _ROWS)][:_ROWS]
    sample = torch.cat([inputs.sample, picked])
    inputs.sample = sample if len(sample) <= _KEPT else sample[::2].clone()
