"""What a step's kernels read, packed on the host so that one copy brings it to the device.

Integers only: token ids, positions, pool slots, block tables. Copies do not wait: each step takes
a buffer of its own from torch's pinned allocator, which reuses one only after its copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens

_ALIGN = 16  # int32s: kernels are compiled for pointers whose alignment does not vary
Ints = NDArray[np.int32]


def send(values: Ints, target: Tensor) -> Tensor:
    """Copy `values` [n] to the front of the int32 tensor `target`; that front."""
    front = target[: values.shape[0]]
    if front.is_cuda:
        host = torch.empty(values.shape[0], dtype=torch.int32, pin_memory=True)
        host.numpy()[:] = values
        return front.copy_(host, non_blocking=True)
    return front.copy_(torch.from_numpy(values))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of a decode step, always at the same addresses (padding rows included).

    Attributes:
        ids: int64 [rows].
        positions, writes: int32 [rows]: of the tokens; flat pool slot of each.
        tables: int32 block tables, and int32 [1]: blocks from one row's to the next.
    """

    ids: Tensor
    positions: Tensor
    writes: Tensor
    tables: tuple[Tensor, Tensor]


class DecodeStage:
    """Decode batches of at most `most` rows and tables of at most `blocks` blocks of `size`."""

    def __init__(self, most: int, blocks: int, size: int, device: torch.device) -> None:
        self._most = -(-most // _ALIGN) * _ALIGN
        self._size = size
        head = 4 * self._most + _ALIGN
        self._host: Ints = np.zeros(head + self._most * _width(blocks), dtype=np.int32)
        self._ids = self._host[: 2 * self._most].view(np.int64)
        self._positions = self._host[2 * self._most : 3 * self._most]
        self._writes = self._host[3 * self._most : 4 * self._most]
        self._tables = self._host[head:]
        self._head = head
        self._width = 0
        self._rows: list[tuple[list[int], int] | None] = [None] * self._most
        self._device = torch.zeros(self._host.shape[0], dtype=torch.int32, device=device)

    def batch(self, rows: int) -> Batch:
        """The device tensors of a step of `rows` rows."""
        most, device = self._most, self._device
        return Batch(
            ids=device[: 2 * most].view(torch.int64)[:rows],
            positions=device[2 * most : 2 * most + rows],
            writes=device[3 * most : 3 * most + rows],
            tables=(device[self._head :], device[4 * most : 4 * most + 1]),
        )

    def stage(self, batch: Sequence[Tokens], rows: int, ids: Tensor | None) -> None:
        """Enqueue the copy of a batch; padding rows write to and read from the scratch block.

        Args:
            ids: the last tokens, on the device; None: as the sequences have them.
        """
        n, size = len(batch), self._size
        last = [len(seq.tokens) - 1 for seq in batch]
        self._positions[:n] = last
        self._positions[n:rows] = 0
        self._writes[:n] = [
            seq.blocks[at // size] * size + at % size for seq, at in zip(batch, last, strict=True)
        ]
        self._writes[n:rows] = 0
        self._ids[:rows] = 0
        if ids is None:
            self._ids[:n] = [seq.tokens[-1] for seq in batch]
        self._put_tables([seq.blocks for seq in batch], rows)
        send(self._host[: self._head + rows * self._width], self._device)
        if ids is not None:
            self.batch(n).ids.copy_(ids)

    def _put_tables(self, blocks: Sequence[list[int]], rows: int) -> None:
        """Write what is new since the last step: a sequence's list of blocks only ever grows, and
        is another list after it was preempted."""
        self._fit(max(map(len, blocks)))
        width = self._width
        for row, own in enumerate(blocks):
            held = self._rows[row]
            known = held[1] if held is not None and held[0] is own else 0
            if known < len(own):
                self._tables[row * width + known : row * width + len(own)] = own[known:]
                self._rows[row] = (own, len(own))
        for row in range(len(blocks), rows):
            self._tables[row * width] = 0
            self._rows[row] = None

    def _fit(self, blocks: int) -> None:
        """Space rows for `blocks` blocks; a much wider space is copied for nothing."""
        width = _width(blocks)
        if width > self._width or 4 * width <= self._width:
            self._width = width
            self._rows = [None] * self._most
            self._host[4 * self._most] = width


@dataclass(frozen=True, slots=True)
class Prompts:
    """Tensors of packed chunks.

    Attributes:
        ids, positions, writes: int32 [rows]: of the tokens; flat pool slot of each.
        keep: int32 [n]: rows whose logits are wanted; `counts` of them belong to each chunk.
        tiles: int32 [n, 4] (see `attend.prefill`).
        tables: int32 block tables of the chunks, and int32 [1]: blocks from one to the next.
    """

    ids: Tensor
    positions: Tensor
    writes: Tensor
    keep: Tensor
    tiles: Tensor
    tables: tuple[Tensor, Tensor]
    counts: list[int]


def stage_prompts(
    chunks: Sequence[Chunk], every: Sequence[bool], size: int, queries: int, device: torch.device
) -> Prompts:
    """Enqueue the copy of packed chunks.

    Args:
        every: per chunk, whether the logits after all its tokens are wanted.
        size: tokens of a block.
        queries: rows of a tile.
    """
    ids: list[int] = []
    counts = [
        chunk.length if all_rows else 1 for chunk, all_rows in zip(chunks, every, strict=True)
    ]
    positions, writes, keep, tiles = [], [], [], []
    width = max(-(-(chunk.start + chunk.length) // size) for chunk in chunks)
    tables = np.zeros((len(chunks), width), dtype=np.int32)
    for index, (chunk, kept) in enumerate(zip(chunks, counts, strict=True)):
        begin, stop = len(ids), chunk.start + chunk.length
        blocks = -(-stop // size)
        tables[index, :blocks] = chunk.seq.blocks[:blocks]
        at = np.arange(chunk.start, stop, dtype=np.int32)
        ids += chunk.seq.tokens[chunk.start : stop]
        positions.append(at)
        writes.append(tables[index, at // size] * size + at % size)
        keep.append(np.arange(len(ids) - kept, len(ids), dtype=np.int32))
        first = np.arange(0, chunk.length, queries, dtype=np.int32)
        tile = np.empty((len(first), 4), dtype=np.int32)
        tile[:, 0], tile[:, 2], tile[:, 3] = begin + first, chunk.start + first, index
        tile[:, 1] = np.minimum(chunk.length - first, queries)
        tiles.append(tile.reshape(-1))
    sent = _send_all(
        [
            np.array(ids, dtype=np.int32),
            *(np.concatenate(part) for part in (positions, writes, keep, tiles)),
            tables.reshape(-1),
            np.array([width], dtype=np.int32),
        ],
        device,
    )
    row_ids, at_rows, slots, kept_rows, tiled, table, row_width = sent
    tiled = tiled.view(-1, 4)
    return Prompts(row_ids, at_rows, slots, kept_rows, tiled, (table, row_width), counts)


def _send_all(parts: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Each array on the device, by one copy."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + -(-part.shape[0] // _ALIGN) * _ALIGN)
    packed = np.zeros(starts[-1], dtype=np.int32)
    for start, part in zip(starts, parts, strict=False):
        packed[start : start + part.shape[0]] = part
    sent = send(packed, torch.empty(starts[-1], dtype=torch.int32, device=device))
    return [sent[start : start + part.shape[0]] for start, part in zip(starts, parts, strict=False)]


def _width(blocks: int) -> int:
    """The smallest power of two from 16 that covers `blocks`."""
    return max(_ALIGN, 1 << (blocks - 1).bit_length())
