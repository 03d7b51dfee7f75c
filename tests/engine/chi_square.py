"""Pearson's chi-square test, for what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LEAST = 5.0  # expected in a cell; rarer cells are put together


def chi_square_tail(observed: Sequence[int], expected: Sequence[float]) -> float:
    """The chance of counts at least as far from the expected shares, were these true."""
    total = sum(observed)
    big = [(o, e * total) for o, e in zip(observed, expected, strict=True) if e * total >= _LEAST]
    rest = (total - sum(o for o, _ in big), total - sum(e for _, e in big))
    cells = big if rest[1] < _LEAST else [*big, rest]
    if rest[1] < _LEAST and rest[0] > 10 * _LEAST:
        return 0.0
    distance = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, distance / 2], dtype=torch.float64)
    tail = float(torch.special.gammaincc(half[0], half[1]))
    assert not math.isnan(tail)
    return tail
