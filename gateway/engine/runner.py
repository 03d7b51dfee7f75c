"""From tokens to logits through transformers' module: prepares a step's inputs, runs it.

Owns the input buffers of a model's steps; decides nothing about which tokens run (`scheduler`) or
which token is picked (`sampler`). One thread at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gateway.engine.attention import Mode, Pool, Segment
from gateway.engine.kv_quant import make_pool
from gateway.engine.model import Model, VariantWeights, build_model, logits_of
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens

__all__ = ["Model", "Runner", "VariantWeights", "build_model", "forward_logits"]

_SERIES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_CONTEXT_STEP = 64  # tokens; context buckets are this times the series
_WINDOW_CHUNK = 256  # tokens at once of a window that goes through the KV cache


class Steps(Protocol):
    """What computes a model's prefill: `Runner`, or a thin runner."""

    def prefill(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]: ...


@torch.inference_mode()
def forward_logits(
    model: Model, windows: Tensor, thin: Callable[..., Steps] | None = None
) -> Tensor:
    """fp32 logits [n, length, vocab] of whole windows (int64 [n, length]).

    Without a KV pool, unless the model quantizes its keys and values, or is outlined: then through
    a small one.

    Args:
        thin: makes the runner of an outlined model, `(model, pool, max_batch=…)`.
    """
    if model.outlined:
        assert thin is not None, "an outlined model has no module to call"
        return _through_cache(model, windows, thin)
    if model.layout.kv is not None:
        return _through_cache(model, windows, Runner)
    model.step.mode = Mode.FULL
    device = next(model.module.parameters()).device
    positions = torch.arange(windows.shape[1], device=device).expand(windows.shape[0], -1)
    return logits_of(model.module, windows.to(device), positions, 0).float()


def _through_cache(model: Model, windows: Tensor, make: Callable[..., Steps]) -> Tensor:
    """`forward_logits` by the engine's own steps, on a pool that holds one window."""
    length = windows.shape[1]
    tail, size = model.layout.tail_blocks, model.layout.block_size(_CONTEXT_STEP)
    blocks = list(range(1 + tail, 1 + tail - (-length // size)))
    device = str(next(model.module.parameters()).device)
    bound = [slot.kv for slot in model.slots]
    pool = make_pool(model.layout, len(blocks) + 1 + tail, size, device)
    runner = make(model, pool, max_batch=1)
    try:
        rows = []
        for window in windows.tolist():
            seq = Tokens("", length, 0, window, blocks=blocks, tail=list(range(1, 1 + tail)))
            for start in range(0, length, _WINDOW_CHUNK):
                chunk = Chunk(seq, start, min(_WINDOW_CHUNK, length - start))
                rows += runner.prefill([chunk], [True])
    finally:
        for slot, kv in zip(model.slots, bound, strict=True):
            slot.kv = kv
    return torch.cat(rows).view(len(windows), length, -1)


class Runner:
    """Runs a model's steps on a KV pool."""

    def __init__(self, model: Model, pool: Pool, *, max_batch: int) -> None:
        self.model = model
        self._size = pool.block_size
        self._device = pool.device
        self._batches = _buckets(max_batch)
        per_step = max(1, _CONTEXT_STEP // self._size)
        blocks = -(-model.context_length // self._size)
        self._contexts = [n * per_step for n in _buckets(-(-blocks // per_step))]
        batch, context = self._batches[-1], self._contexts[-1]

        def buffer(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._ids = buffer(batch, 1)
        self._positions = buffer(batch, 1)
        self._writes = buffer(batch)
        self._tails = buffer(batch)
        self._own = buffer(batch)
        self._tables = buffer(batch * context)
        self._columns = torch.arange(context * self._size, device=self._device)
        cells = batch * context * self._size
        dtype = torch.float32 if self._device.type == "cpu" else model.layout.dtype
        self._masks = [buffer(cells, dtype=dtype) for _ in model.step.windows]
        self.bind(pool)

    def bind(self, pool: Pool) -> None:
        """Use (another) pool of the model's layout."""
        self._pool = pool
        for slot, layer in zip(self.model.slots, pool.layers, strict=True):
            slot.kv = layer

    @torch.inference_mode()
    def decode(self, batch: Sequence[Tokens]) -> Tensor:
        """Compute the last token of every sequence; fp32 logits [batch, vocab] of what follows."""
        rows = self._batches[bisect_left(self._batches, len(batch))]
        self.stage(batch, rows)
        logits = logits_of(self.model.module, self._ids[:rows], self._positions[:rows], 0)
        return logits[: len(batch), 0].float()

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]:
        """Compute chunks; for each the fp32 logits [n, vocab] after its last token.

        Args:
            every: per chunk, whether the logits after all its tokens are wanted.
        """
        self.stage_chunks(chunks)
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        counts: list[int] = []
        begin = 0
        for chunk, all_logits in zip(chunks, every, strict=True):
            stop = chunk.start + chunk.length
            ids += chunk.seq.tokens[chunk.start : stop]
            positions += range(chunk.start, stop)
            begin += chunk.length
            kept = chunk.length if all_logits else 1
            counts.append(kept)
            keep += range(begin - kept, begin)
        logits = logits_of(
            self.model.module,
            self._tensor(ids)[None],
            self._tensor(positions)[None],
            self._tensor(keep),
        )
        return list(torch.split(logits[0].float(), counts))

    def stage_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Put what attention needs for a prefill of `chunks` into the model's step."""
        writes: list[int] = []
        segments: list[Segment] = []
        begin = 0
        for chunk in chunks:
            blocks = chunk.seq.blocks
            writes += [
                blocks[at // self._size] * self._size + at % self._size
                for at in range(chunk.start, chunk.start + chunk.length)
            ]
            segments.append(self._segment(chunk, begin))
            begin += chunk.length
        step = self.model.step
        step.mode, step.segments, step.writes = Mode.PREFILL, segments, self._tensor(writes)

    def stage(self, batch: Sequence[Tokens], rows: int) -> None:
        """Fill the decode buffers and the model's step; padding rows write to and read from the
        scratch block."""
        size, pad = self._size, rows - len(batch)
        longest = max(len(seq.tokens) for seq in batch)
        context = self._contexts[bisect_left(self._contexts, -(-longest // size))]
        last = [len(seq.tokens) - 1 for seq in batch] + [0] * pad
        writes = [
            seq.blocks[at // size] * size + at % size for seq, at in zip(batch, last, strict=False)
        ]
        tables = torch.zeros(rows, context, dtype=torch.long)
        for row, seq in zip(tables, batch, strict=False):
            # A draft may have reserved more blocks than any row reads now.
            blocks = seq.blocks[:context]
            row[: len(blocks)] = torch.tensor(blocks)
        positions = torch.tensor(last)[:, None]
        self._ids[:rows] = torch.tensor([seq.tokens[-1] for seq in batch] + [0] * pad)[:, None]
        self._positions[:rows] = positions
        self._writes[:rows] = torch.tensor(writes + [0] * pad)
        self._tables[: rows * context] = tables.view(-1)
        step = self.model.step
        step.mode = Mode.DECODE
        step.writes = self._writes[:rows]
        step.tables = self._tables[: rows * context]
        if self.model.layout.kv is not None:
            self._stage_groups(batch, last)
        length = context * size
        behind = self._positions[:rows] - self._columns[:length]
        step.masks = []
        for window, buffer in zip(step.windows, self._masks, strict=True):
            hidden = behind < 0
            if window is not None:
                hidden |= behind >= window
            mask = buffer[: rows * length].view(rows, 1, 1, length)
            mask.zero_().masked_fill_(hidden[:, None, None], float("-inf"))
            step.masks.append(mask)

    def _stage_groups(self, batch: Sequence[Tokens], last: Sequence[int]) -> None:
        """Where the rows' incomplete groups are, and which of them this step completes."""
        rows, own = len(last), [at // self._size for at in last]
        # Without a block of its own, the tail lies in the group's.
        tails = [
            seq.tail[0] if seq.tail else seq.blocks[at] for seq, at in zip(batch, own, strict=False)
        ]
        self._own[:rows] = torch.tensor(own)
        self._tails[:rows] = torch.tensor(tails + [0] * (rows - len(batch)))
        step = self.model.step
        step.own, step.tails = self._own[:rows], self._tails[:rows]
        step.complete = [i for i in range(len(batch)) if (last[i] + 1) % self._size == 0]

    def _segment(self, chunk: Chunk, begin: int) -> Segment:
        stop = chunk.start + chunk.length
        masks = [self._pool.mask(chunk.start, stop, w) for w in self.model.step.windows]
        blocks = self._tensor(chunk.seq.blocks[: -(-stop // self._size)])
        tail = chunk.seq.tail[0] if chunk.seq.tail else 0
        return Segment(begin, begin + chunk.length, chunk.start, blocks, masks, tail)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _buckets(most: int) -> list[int]:
    """The series up to the first number that covers `most`."""
    if most > _SERIES[-1]:
        return [*_SERIES, *range(_SERIES[-1] * 2, most + _SERIES[-1], _SERIES[-1])]
    return list(_SERIES[: bisect_left(_SERIES, most) + 1])
