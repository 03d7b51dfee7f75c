"""Depth pruning: whole decoder blocks dropped by measured importance.

Block influence (ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1) of block i with input x and
output y per token: BI_i = 1 − E[xᵀy / (‖x‖‖y‖)]. It ranks blocks from one pass, but scores each as
if no other were dropped and sees only angles; so it proposes, and the divergence from the whole
model decides: blocks go one at a time, each time the one among the least influential without which
the output changes least (as SLEB does by perplexity, Song et al. 2024, arXiv:2402.09025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

# Blocks tried per drop: all of a small model, the least influential of a large one.
_CANDIDATES = 16


class Probe(Protocol):
    """Measures a model on calibration text."""

    def influence(self) -> Sequence[float]:
        """Block influence of every block."""

    def loss(self, kept: Sequence[int]) -> float:
        """Mean KL divergence (nats) from the whole model with only the blocks `kept`."""


def block_influence(before: Tensor, after: Tensor) -> float:
    """BI of a block from its input and output, each [..., hidden]."""
    return 1.0 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())


def solve(probe: Probe, *, kept: int) -> tuple[int, ...]:
    """Indices of the `kept` blocks to keep, ascending."""
    influence = probe.influence()
    left = list(range(len(influence)))
    while len(left) > kept:
        candidates = sorted(left, key=lambda i: influence[i])[:_CANDIDATES]
        worst = min(candidates, key=lambda i: probe.loss([b for b in left if b != i]))
        left.remove(worst)
    return tuple(left)
