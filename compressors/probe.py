"""Measuring what decoder blocks are worth, for depth pruning. Weights are mapped, not copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
        self._influence: list[float] = []
        said("block influence")
        self._whole = list(self._walk.hidden)
        for index in range(len(source.blocks)):
            self._walk.load(index)
            before, self._whole = (
                self._whole,
                [self._walk.run(index, batch) for batch in self._whole],
            )
            shares = [
                block_influence(x, y) * len(x) for x, y in zip(before, self._whole, strict=True)
            ]
            self._influence.append(sum(shares) / sum(map(len, before)))

    def influence(self) -> Sequence[float]:
        """Block influence of every block."""
        return self._influence

    def loss(self, kept: Sequence[int]) -> float:
        """Mean KL divergence (nats) from the whole model with only the blocks `kept`, in order."""
        self._said(f"loss with {len(kept)} blocks")
        total, count = 0.0, 0
        for batch, whole in enumerate(self._whole):
            hidden = self._walk.hidden[batch]
            for index in kept:
                hidden = self._walk.run(index, hidden)
            tokens = self._walk.tokens[batch]
            # One window at a time: logits of a large vocabulary are the largest tensors here.
            for row in range(len(tokens)):
                one = slice(row, row + 1)
                reference = self._walk.logits(tokens[one], whole[one]).float().log_softmax(-1)
                pruned = self._walk.logits(tokens[one], hidden[one]).float().log_softmax(-1)
                total += float((reference.exp() * (reference - pruned)).sum())
                count += pruned.shape[1]
        return total / count
