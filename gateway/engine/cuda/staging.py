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
        self._fit(max(map(len, blocks), default=1))
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
        keep: int32 [n]: rows whose logits are wanted.
        tiles: int32 [n, 4] (see `attend.prefill`).
        tables: int32 block tables of the chunks, and int32 [1]: blocks from one to the next.
        filled: there may be rows that belong to no tile.
    """

    ids: Tensor
    positions: Tensor
    writes: Tensor
    keep: Tensor
    tiles: Tensor
    tables: tuple[Tensor, Tensor]
    filled: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What a step of chunks is filled up to, so that its launches are always the same."""

    rows: int
    keep: int
    tiles: int


def pack_prompts(
    chunks: Sequence[Chunk], counts: Sequence[int], size: int, queries: int
) -> list[Ints]:
    """Ids, positions, writes, rows to keep, tiles, table width and tables of packed chunks.

    Args:
        counts: per chunk, how many of its last tokens' logits are wanted.
        size: tokens of a block.
        queries: rows of a tile.
    """
    ids: list[int] = []
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
    return [
        np.array(ids, dtype=np.int32),
        *(np.concatenate(part) for part in (positions, writes, keep, tiles)),
        np.array([width], dtype=np.int32),
        tables.reshape(-1),
    ]


def fill_up(parts: list[Ints], room: Room) -> list[Ints]:
    """Zeros up to the room: rows that go to the scratch block, tiles of no rows."""
    lengths = (room.rows, room.rows, room.rows, room.keep, 4 * room.tiles)
    return [np.pad(p, (0, n - len(p))) for p, n in zip(parts, lengths, strict=False)] + parts[5:]


def send_prompts(parts: Sequence[Ints], target: Tensor) -> Tensor:
    """Enqueue one copy of what `pack_prompts` gave to the front of int32 `target`; that front."""
    starts = _starts([len(part) for part in parts])
    packed = np.zeros(starts[-1], dtype=np.int32)
    for start, part in zip(starts, parts, strict=False):
        packed[start : start + len(part)] = part
    return send(packed, target)


def prompts_at(packed: Tensor, lengths: Sequence[int], *, filled: bool) -> Prompts:
    """The tensors of chunks whose parts have these lengths, in a packed int32 tensor."""
    ids, positions, writes, keep, tiles, width, tables = (
        packed[start : start + length]
        for start, length in zip(_starts(lengths), lengths, strict=False)
    )
    return Prompts(ids, positions, writes, keep, tiles.view(-1, 4), (tables, width), filled)


def ints(lengths: Sequence[int]) -> int:
    """int32s that parts of these lengths take."""
    return _starts(lengths)[-1]


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + -(-length // _ALIGN) * _ALIGN)
    return starts


def _width(blocks: int) -> int:
    """The smallest power of two from 16 that covers `blocks`."""
    return max(_ALIGN, 1 << (blocks - 1).bit_length())
