"""Measuring what decoder blocks are worth, for depth pruning. Weights are mapped, not copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.prune.depth import block_influence
from compressors.walk import Source, Walk

# Enough text to rank blocks; the losses of two candidates are compared on the same tokens.
_TOKENS = 8192


class DepthProbe:
    """Implements `prune.depth.Probe` by running the model on calibration windows.

    Computes in the checkpoint's own dtype, in which the CPU maps the weights without a copy.

    Args:
        said: called with what is being measured, before each pass over the text.
    """

    def __init__(
        self,
        source: Source,
        windows: Tensor,
        said: Callable[[str], None],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        enough = max(1, _TOKENS // windows.shape[1])
        self._said = said
        self._walk = Walk(source, windows[:enough], dtype=None, device=device)
        self._start = list(self._walk.hidden)
        self._blocks = len(source.blocks)
        for index in range(self._blocks):
            self._walk.load(index)

    def influence(self) -> Sequence[float]:
        """Block influence of every block."""
        self._said("block influence")
        hidden = list(self._start)
        influence = []
        for index in range(self._blocks):
            after = [self._walk.run(index, batch) for batch in hidden]
            pairs = zip(hidden, after, strict=True)
            shares = [block_influence(x, y) * len(x) for x, y in pairs]
            influence.append(sum(shares) / sum(map(len, hidden)))
            hidden = after
        return influence

    def loss(self, kept: Sequence[int]) -> float:
        """Mean next-token loss (nats) with only the blocks `kept`, in order."""
        self._said(f"loss with {len(kept)} blocks")
        total, count = 0.0, 0
        for tokens, start in zip(self._walk.tokens, self._start, strict=True):
            hidden = start
            for index in kept:
                hidden = self._walk.run(index, hidden)
            logits = self._walk.logits(tokens, hidden)[:, :-1].float()
            targets = tokens[:, 1:]
            total += float(
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            )
            count += targets.numel()
        return total / count
