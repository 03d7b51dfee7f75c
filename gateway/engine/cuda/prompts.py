"""Packed chunks of prompts as steps: short ones as CUDA graphs by size, long ones launched.

Launching a step takes a host longer than a device needs for some hundred tokens. Those are filled
up to one of a few sizes, of which each is one graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gateway.engine.cuda import attend
from gateway.engine.cuda.graphs import Graphs
from gateway.engine.cuda.staging import (
    Prompts,
    Room,
    fill_up,
    ints,
    pack_prompts,
    prompts_at,
    send_prompts,
)
from gateway.engine.scheduler import Chunk

_ROWS = (16, 32, 64, 96, 128, 192, 256)
_LONG = 512
_CHUNKS = 8  # of a filled-up step at most


class PromptSteps:
    """Runs `compute(prompts)`, logits of the kept rows, on chunks of a pool of blocks of `size`.

    Args:
        blocks: of the longest table.
        filled: whether short steps are filled up, and captured where that can be done.
    """

    def __init__(
        self,
        compute: Callable[[Prompts], Tensor],
        size: int,
        blocks: int,
        device: torch.device,
        *,
        filled: bool,
    ) -> None:
        self._compute = compute
        self._size = size
        self._device = device
        self._filling = filled
        self._tables = _CHUNKS * blocks
        count = ints(self._lengths(_ROWS[-1])) if filled else 0
        self._packed = torch.zeros(count, dtype=torch.int32, device=device)
        self._graphs = Graphs(self._filled, enabled=filled and device.type == "cuda")

    def run(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]:
        """fp32 logits [n, vocab] of each chunk (see `runners.StepRunner.prefill`)."""
        counts = [chunk.length if whole else 1 for chunk, whole in zip(chunks, every, strict=True)]
        parts = pack_prompts(chunks, counts, self._size, attend.QUERIES)
        if self._filling and len(parts[0]) <= _ROWS[-1] and sum(counts) <= _CHUNKS:
            rows = _ROWS[bisect_left(_ROWS, len(parts[0]))]
            send_prompts(fill_up(parts, _room(rows)), self._packed)
            # A copy: the next step overwrites what a graph leaves.
            logits = self._graphs.run(rows)[: sum(counts)].to(torch.float32, copy=True)
        else:
            lengths = [len(part) for part in parts]
            target = torch.empty(ints(lengths), dtype=torch.int32, device=self._device)
            staged = prompts_at(send_prompts(parts, target), lengths, filled=False)
            logits = self._compute(staged).float()
        return list(torch.split(logits, counts))

    def warm(self) -> None:
        """Run short steps of every size and a long one, on rows that belong to nobody."""
        for rows in _ROWS:
            self._filled(rows)
        lengths = self._lengths(_LONG)
        nothing = torch.zeros(ints(lengths), dtype=torch.int32, device=self._device)
        self._compute(prompts_at(nothing, lengths, filled=True))

    def drop(self) -> None:
        """Forget all graphs: the pool is another."""
        self._graphs.drop()

    def _filled(self, rows: int) -> Tensor:
        return self._compute(prompts_at(self._packed, self._lengths(rows), filled=True))

    def _lengths(self, rows: int) -> list[int]:
        room = _room(rows)
        return [rows, rows, rows, room.keep, 4 * room.tiles, 1, self._tables]


def _room(rows: int) -> Room:
    return Room(rows, _CHUNKS, rows // attend.QUERIES + _CHUNKS)
