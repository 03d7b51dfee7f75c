"""A batch's tokens between being picked and being read: at once on the CPU, later on a device.

The host may launch the next step while they are computed: `tokens` is its input, `collect` waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gateway.engine.device_sampler import pick_on_device, upload
from gateway.engine.sampler import RowState, Scored, pick, read_scores, score_tensors


class Draw(Protocol):
    """Tokens picked for a batch, perhaps not computed yet."""

    @property
    def tokens(self) -> Tensor:
        """int64 [rows] on the logits' device."""
        ...

    def collect(self) -> list[Scored]:
        """The tokens on the host; waits for them."""
        ...


def launch(parts: Sequence[Tensor], rows: Sequence[RowState]) -> Draw:
    """Pick the next token of every row; the caller tells the rows which tokens it keeps.

    Args:
        parts: fp32 [n, vocab], together one line per row; not changed.
    """
    if parts[0].device.type != "cpu":
        return DeviceDraw(torch.cat(list(parts)) if len(parts) > 1 else parts[0], rows)
    scored: list[Scored] = []
    for part in parts:
        scored += pick(part, rows[len(scored) : len(scored) + part.shape[0]])
    return HostDraw(scored)


class HostDraw:
    """Tokens that are on the host already."""

    def __init__(self, scored: list[Scored]) -> None:
        self._scored = scored

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([item.token for item in self._scored])

    def collect(self) -> list[Scored]:
        return self._scored


class DeviceDraw:
    """Tokens that are being computed, and their way to the host."""

    def __init__(self, logits: Tensor, rows: Sequence[RowState]) -> None:
        """`logits`: fp32 [rows, vocab]; may be written again by what the stream runs later."""
        self._rows = rows
        self._wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        self.tokens = pick_on_device(logits, rows)
        found = [self.tokens]
        if self._wanted:
            most = max(rows[i].params.logprobs or 0 for i in self._wanted)
            index = upload(self._wanted, torch.long, logits.device)
            found += score_tensors(logits[index], self.tokens[index], most)
        self._host = [_download(tensor) for tensor in found]
        self._done = torch.cuda.Event() if logits.is_cuda else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()

    def collect(self) -> list[Scored]:
        if self._done is not None:
            self._done.synchronize()
        picked: list[int] = self._host[0].tolist()
        scored = [Scored(token) for token in picked]
        if self._wanted:
            found = read_scores([picked[i] for i in self._wanted], *self._host[1:])
            for i, item in zip(self._wanted, found, strict=True):
                top = item.top[: self._rows[i].params.logprobs]
                scored[i] = Scored(item.token, item.logprob, top)
        return scored


def _download(tensor: Tensor) -> Tensor:
    """A copy on the host, complete once what is enqueued so far has run."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
