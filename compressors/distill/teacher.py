"""The teacher: the dense model's last hidden state at every training position.

Student and teacher are compared on logits, and the head that makes them is small beside the model:
so the dense model runs once over a set of rows, one block in memory at a time, and only its last
hidden states are kept (rows × length × hidden size, in the checkpoint's dtype). The dense weights
are never held beside the student; embeddings, norms and head are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressors.checkpoint import Checkpoint
from compressors.distill.compute import computing
from compressors.plan import open_source
from compressors.walk import Walk


class Teacher:
    """Logits of the dense model of `checkpoint` on rows it was shown."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> None:
        self._checkpoint, self._device = checkpoint, device
        self._tokens = torch.empty(0)
        self._hidden = torch.empty(0)
        self._walk: Walk | None = None

    def read(self, tokens: Tensor, say: Callable[[float], None] = lambda _share: None) -> None:
        """Run over rows of token ids, int64 [n, length]; forgets what it read before."""
        source = open_source(self._checkpoint)
        kept = next(iter(source.model.parameters())).dtype
        with computing(self._device):
            walk = Walk(source, tokens, device=self._device)
            for index in range(len(source.blocks)):
                walk.load(index)
                walk.advance(index)
                walk.free(index)
                say((index + 1) / len(source.blocks))
        self._hidden = torch.cat([hidden.to(kept) for hidden in walk.hidden])
        walk.hidden.clear()
        self._tokens, self._walk = tokens, walk

    def logits(self, rows: Tensor) -> Tensor:
        """Logits [len(rows), length, V] of the rows with these numbers (int64)."""
        assert self._walk is not None, "the teacher has read nothing"
        hidden = self._hidden[rows.to(self._hidden.device)].float()
        return self._walk.logits(self._tokens[rows].to(self._device), hidden)
