"""Steps of a CPU model without transformers' Python: a few native calls for a whole forward.

Prepares a step's inputs (ids, positions, places in the pool) and runs the programs of
`native_build`. Decides nothing about which tokens run; one thread at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gateway.engine.attention import Pool
from gateway.engine.model import Model
from gateway.engine.native_build import Builder, roots
from gateway.engine.native_linears import DTYPES, limits
from gateway.engine.native_step import Buffers, Operations, Program, Step, operations
from gateway.engine.runner import Runner
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def make(model: Model, pool: Pool, max_batch: int) -> NativeRunner | None:
    """A runner for the model, None where this host or its dtype has none."""
    found = operations()
    if found is None or model.decoder is None or model.layout.dtype not in DTYPES:
        return None
    return NativeRunner(model, pool, max_batch, found)


class NativeRunner:
    """`StepRunner` over native programs."""

    def __init__(self, model: Model, pool: Pool, max_batch: int, found: Operations) -> None:
        assert model.decoder is not None
        self.model = model
        self._operations, self._max_batch = found, max_batch
        self._limits = limits(roots(model.decoder), model.layout.dtype)
        # A quantized pool's attention is its own and reads the model's `Step`.
        self._eager = None if model.layout.kv is None else Runner(model, pool, max_batch=max_batch)
        self._inputs = _Inputs(max_batch)
        self._bodies: dict[int, Program] = {}
        self._heads: dict[int, tuple[Program, Callable[[Tensor], None]]] = {}
        self.bind(pool)

    def bind(self, pool: Pool) -> None:
        """Use (another) pool of the model's layout."""
        self._size = pool.block_size
        for slot, layer in zip(self.model.slots, pool.layers, strict=True):
            slot.kv = layer
        if self._eager is not None:
            self._eager.bind(pool)
        width = -(-self.model.context_length // self._size) + 1
        self._tables = _Tables(self._max_batch, width, self._size)
        self._prepare(self._inputs.rows)

    def _prepare(self, rows: int) -> None:
        """Make buffers for `rows` rows; programs over the former ones go."""
        self._inputs = _Inputs(rows)
        self._buffers = Buffers(rows)
        self._bodies, self._heads = {}, {}

    @torch.inference_mode()
    def decode(self, batch: Sequence[Tokens]) -> Tensor:
        """Compute the last token of every sequence; fp32 logits [batch, vocab] of what follows."""
        rows, inputs = len(batch), self._inputs
        if self._eager is not None:
            self._eager.stage(batch, rows)
        last = [len(seq.tokens) - 1 for seq in batch]
        inputs.ids[:rows] = [seq.tokens[-1] for seq in batch]
        inputs.positions[:rows] = last
        segments, slots = self._tables.place(batch, last)
        inputs.slots[:rows] = slots
        return self._run(inputs.step(rows, segments))

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]:
        """Compute chunks; for each the fp32 logits [n, vocab] after its last token.

        Args:
            every: per chunk, whether the logits after all its tokens are wanted.
        """
        logits, counts = self._packed(chunks, every)
        return list(torch.split(logits, counts))

    @torch.inference_mode()
    def mixed(
        self, batch: Sequence[Tokens], chunks: Sequence[Chunk], every: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor]] | None:
        """`decode` and `prefill` in one step that reads the weights once; None: so many rows are
        computed in another way than those of `batch` alone."""
        count = len(batch)
        rows = count + sum(chunk.length for chunk in chunks)
        if self._eager is not None or self._limit(count) != self._limit(rows):
            return None
        ones = [Chunk(seq, len(seq.tokens) - 1, 1) for seq in batch]
        logits, counts = self._packed([*ones, *chunks], [False] * count + list(every))
        return logits[:count], list(torch.split(logits[count:], counts[count:]))

    def _packed(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> tuple[Tensor, list[int]]:
        """fp32 logits [sum of counts, vocab] of chunks in one step, and the counts."""
        rows = sum(chunk.length for chunk in chunks)
        if rows > self._inputs.rows:
            self._prepare(max(rows, 2 * self._inputs.rows))
        if self._eager is not None:
            self._eager.stage_chunks(chunks)
        inputs, begin, outputs = self._inputs, 0, 0
        segments = np.empty((len(chunks), 4), dtype=np.int64)
        tables, counts = [], []
        for row, chunk, all_logits in zip(segments, chunks, every, strict=True):
            stop, end = chunk.start + chunk.length, begin + chunk.length
            positions = np.arange(chunk.start, stop)
            tables.append(np.array(chunk.seq.blocks, dtype=np.int32))
            inputs.ids[begin:end] = chunk.seq.tokens[chunk.start : stop]
            inputs.positions[begin:end] = positions
            own = tables[-1][positions // self._size].astype(np.int64)
            inputs.slots[begin:end] = own * self._size + positions % self._size
            row[:] = begin, end, chunk.start, tables[-1].ctypes.data
            counts.append(chunk.length if all_logits else 1)
            inputs.kept[outputs : outputs + counts[-1]] = np.arange(end - counts[-1], end)
            begin, outputs = end, outputs + counts[-1]
        return self._run(inputs.step(rows, segments, outputs)), counts

    def _limit(self, rows: int) -> int:
        """Rows up to which a step is computed as one of so many is."""
        return self._limits[bisect_left(self._limits, rows)]

    def _run(self, step: Step) -> Tensor:
        most = self._limit(step.rows)
        if most not in self._bodies:
            self._bodies[most] = self._builder(most).body()
        self._bodies[most].run(step)
        most = self._limit(step.outputs)
        if most not in self._heads:
            self._heads[most] = self._builder(most).head()
        program, aim = self._heads[most]
        # Fresh, because the last step's may still be read; the allocator hands the memory back.
        # The dtype is said: the default one is another thread's while transformers builds a model.
        logits = torch.empty(step.outputs, self.model.vocab_size, dtype=torch.float32)
        aim(logits)
        program.run(step)
        return logits

    def _builder(self, most: int) -> Builder:
        ids = torch.from_numpy(self._inputs.ids)
        return Builder(self.model, self._operations, self._buffers, ids, most)


class _Inputs:
    """A step's inputs for up to `rows` rows, at fixed addresses."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.ids, self.positions, self.slots, self.kept = (
            np.zeros(rows, dtype=np.int64) for _ in range(4)
        )
        self._all: Numbers = np.arange(rows)
        arrays = (self.ids, self.positions, self.slots, self.kept, self._all)
        *self._places, self._kept_place, self._all_place = (a.ctypes.data for a in arrays)
        self._segments: Numbers = np.empty((0, 4), dtype=np.int64)

    def step(self, rows: int, segments: Numbers, outputs: int | None = None) -> Step:
        """The step of the first `rows` rows; `outputs` of them are in `kept`, None: all are."""
        self._segments = segments  # alive as long as the step
        return Step(
            *self._places,
            self._all_place if outputs is None else self._kept_place,
            segments.ctypes.data,
            rows,
            rows if outputs is None else outputs,
            len(segments),
            torch.get_num_threads(),
        )


class _Tables:
    """Block tables of the running rows, [rows, width], written only where they changed."""

    def __init__(self, rows: int, width: int, size: int) -> None:
        self._tables = np.zeros((rows, width), dtype=np.int32)
        self._known: list[list[int]] = [[] for _ in range(rows)]
        self._size = size
        at = np.arange(rows)
        tables = self._tables.ctypes.data + at * self._tables.strides[0]
        self._segments = np.stack((at, at + 1, at, tables), axis=1)

    def place(self, batch: Sequence[Tokens], last: Sequence[int]) -> tuple[Numbers, list[int]]:
        """Segments [batch, 4] of one row each, at position `last`; and the rows' pool slots."""
        size, slots = self._size, []
        for row, (seq, at) in enumerate(zip(batch, last, strict=True)):
            blocks = seq.blocks
            if blocks != self._known[row]:
                self._known[row] = list(blocks)
                self._tables[row, : len(blocks)] = blocks[: self._tables.shape[1]]
            slots.append(blocks[at // size] * size + at % size)
        segments = self._segments[: len(batch)]
        segments[:, 2] = last
        return segments, slots
