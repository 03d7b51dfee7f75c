"""A decoder's step on a CUDA device: its parts put together from Triton kernels and linears.

Decode steps are CUDA graphs by batch size; nothing here waits for the device. Owns the step's
buffers; which tokens run and which token is picked is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gateway.engine.attention import PlainKV, Pool
from gateway.engine.cuda import attend, attend_one, digits, kernels
from gateway.engine.cuda.graphs import Graphs
from gateway.engine.cuda.prompts import PromptSteps
from gateway.engine.cuda.staging import DecodeStage, Prompts
from gateway.engine.cuda.weights import Gated, Joined, Single
from gateway.engine.decoder import Attention, Block, Decoder, GatedMlp, Norm, Rotary
from gateway.engine.kernels.triton_digits import Digits, Heads
from gateway.engine.runner import Model
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens

_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_BATCH_STEP = 32  # beyond


class _Layer(NamedTuple):
    attention: Attention
    rows: Joined
    turn: kernels.Turn
    shape: attend.Shape
    turns: bool  # one row's linears can turn heads themselves
    seen: int  # group of the digits that attention to one row becomes; 0: it stays numbers
    output: Single
    norm: Norm
    mlp: Gated | _Other


class CudaRunner:
    """`runners.StepRunner` on a device with Triton. Graphs only where that device is CUDA's."""

    def __init__(self, model: Model, parts: Decoder, pool: Pool, max_batch: int) -> None:
        self.model = model
        self._parts = parts
        dtype = model.layout.dtype
        self._layers = [_layer(block, parts.rotary, dtype) for block in parts.blocks]
        self._head = Single(parts.head)
        self._batches = _buckets(max_batch)
        device, most = pool.device, self._batches[-1]
        blocks = -(-model.context_length // pool.block_size)
        self._stage = DecodeStage(most, blocks, pool.block_size, device)
        heads = max(layer.shape.heads for layer in self._layers)
        kv_heads = max(shape.kv_heads for shape in model.layout.layers)
        dim = max(shape.key_dim for shape in model.layout.layers)
        self._scratch = {
            rows: attend.make_scratch(rows, heads, kv_heads, dim, device) for rows in self._batches
        }
        # A module of another kind may read its input on the host.
        plain = all(isinstance(block.mlp, GatedMlp) for block in parts.blocks)
        captured = device.type == "cuda" and plain
        self._graphs = Graphs(self._decode_rows, enabled=captured)
        self._prompts = PromptSteps(
            self.prompt_logits, pool.block_size, blocks, device, filled=captured
        )
        self.bind(pool)

    def bind(self, pool: Pool) -> None:
        """Use (another) pool of the model's layout."""
        for slot, layer in zip(self.model.slots, pool.layers, strict=True):
            slot.kv = layer
        self._graphs.drop()
        self._prompts.drop()

    @torch.inference_mode()
    def decode(self, batch: Sequence[Tokens]) -> Tensor:
        """Compute the last token of every sequence; fp32 logits [batch, vocab] of what follows."""
        return self._decode(batch, None)

    @torch.inference_mode()
    def decode_from(self, batch: Sequence[Tokens], ids: Tensor) -> Tensor:
        """`decode`, but the last tokens are `ids` (int64 [batch], on the device); the sequences
        need not know them yet."""
        return self._decode(batch, ids)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]:
        """Compute chunks; for each the fp32 logits [n, vocab] after its last token, or after all
        its tokens where `every` says so."""
        return self._prompts.run(chunks, every)

    @torch.inference_mode()
    def warm(self) -> None:
        """Run steps of every size once, on nothing: what they need is compiled then."""
        if self._graphs.enabled:
            for rows in self._batches:
                self._stage.stage([], rows, None)
                self._decode_rows(rows)
            self._prompts.warm()

    def prompt_logits(self, staged: Prompts) -> Tensor:
        """Logits [n, vocab] of the rows to keep."""

        def ask(layer: _Layer, x: Tensor | Digits, pool: tuple[Tensor, Tensor]) -> Tensor:
            query, key, value = layer.rows(x)
            where = staged.positions, staged.writes
            kernels.turn_and_store((query, key, value), layer.turn, where, pool)
            return attend.prefill(
                query, pool, staged.tables, staged.tiles, layer.shape, zeroed=staged.filled
            )

        x, delta = self._blocks(staged.ids, ask)
        keep = staged.keep
        x, delta = x.index_select(0, keep), delta.index_select(0, keep)
        return self._head(_normed(x, delta, self._parts.norm, None))

    def _decode(self, batch: Sequence[Tokens], ids: Tensor | None) -> Tensor:
        rows = self._batches[bisect_left(self._batches, len(batch))]
        self._stage.stage(batch, rows, ids)
        # A copy: the next step overwrites what a graph leaves.
        return self._graphs.run(rows)[: len(batch)].to(torch.float32, copy=True)

    def _decode_rows(self, rows: int) -> Tensor:
        """Logits [rows, vocab] of the staged batch. The launches that a graph holds."""
        staged, scratch, alone = self._stage.batch(rows), self._scratch[rows], rows == 1
        turns = alone and any(layer.turns and layer.rows.group for layer in self._layers)
        angles = attend_one.turns(staged.positions, self._parts.rotary) if turns else None

        def ask(layer: _Layer, x: Tensor | Digits, pool: tuple[Tensor, Tensor]) -> Tensor | Digits:
            if angles is not None and layer.turns and isinstance(x, Digits):
                _, _, kv_heads, dim = pool[0].shape
                heads = Heads(angles, staged.writes, *pool, layer.shape.heads, kv_heads, dim)
                query = layer.rows.turned(x, heads)
            else:
                # In two launches: rows may share a table and read what the others store.
                query, key, value = layer.rows(x)
                where = staged.positions, staged.writes
                kernels.turn_and_store((query, key, value), layer.turn, where, pool)
            if alone:
                setting = layer.shape, scratch
                return attend_one.decode_one(query, staged, pool, setting, layer.seen)
            return attend.decode(
                query, staged.positions, pool, staged.tables, (layer.shape, scratch)
            )

        x, delta = self._blocks(staged.ids, ask, one=alone)
        return self._head(_normed(x, delta, self._parts.norm, self._head if alone else None))

    def _blocks(
        self,
        ids: Tensor,
        ask: Callable[[_Layer, Tensor | Digits, tuple[Tensor, Tensor]], Tensor | Digits],
        *,
        one: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """All blocks over rows of tokens: the residual stream and what is still to be added.

        Args:
            ask: computes queries, keys and values of a layer, stores these in its pool and
                attends.
            one: for one row, given on as digits where linears take them.
        """
        x: Tensor = self._parts.embed(ids)
        delta: Tensor | None = None
        for layer in self._layers:
            normed = _normed(x, delta, layer.attention.norm, layer.rows if one else None)
            seen = ask(layer, normed, _tensors(layer.attention))
            delta = layer.output(seen)
            delta = layer.mlp(_normed(x, delta, layer.norm, layer.mlp if one else None))
        assert delta is not None, "a decoder has blocks"
        return x, delta


class _Other:
    """An MLP of another kind: a module [1, rows, hidden] → the same."""

    group = 0

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor | Digits) -> Tensor:
        assert isinstance(x, Tensor), "no digits are made for it"
        out: Tensor = self._module(x[None])[0]
        return out.contiguous()


def _normed(
    x: Tensor, delta: Tensor | None, norm: Norm, reader: Joined | Gated | Single | _Other | None
) -> Tensor | Digits:
    """The norm of x + delta, which stays in x; as digits if the reader of one row takes them."""
    if reader is not None and reader.group and x.dtype is torch.bfloat16:
        return digits.add_norm(x, delta, norm, reader.group)
    return kernels.add_norm(x, delta, norm)


def _layer(block: Block, rotary: Rotary, dtype: torch.dtype) -> _Layer:
    attention, mlp = block.attention, block.mlp
    norms = None
    if attention.query_norm is not None and attention.key_norm is not None:
        norms = attention.query_norm, attention.key_norm
    output = Single(attention.output)
    heads = attention.heads, attention.kv_heads, attention.dim
    bfloat = dtype is torch.bfloat16
    whole = bfloat and output.group and attend_one.splits_into(*heads, output.group)
    return _Layer(
        attention=attention,
        rows=Joined([attention.query, attention.key, attention.value]),
        turn=kernels.Turn(norms, rotary),
        shape=attend.Shape(attention.heads, attention.scale, attention.window or 0),
        turns=bfloat and norms is None and not attention.dim % 32,
        seen=output.group if whole else 0,
        output=output,
        norm=block.norm,
        mlp=Gated(mlp) if isinstance(mlp, GatedMlp) else _Other(mlp),
    )


def _tensors(attention: Attention) -> tuple[Tensor, Tensor]:
    kv = attention.slot.kv
    assert isinstance(kv, PlainKV), "a step needs a bound pool of plain keys and values"
    return kv.keys, kv.values


def _buckets(most: int) -> list[int]:
    """Batch sizes that steps are padded to, up to the first that covers `most`."""
    if most > _BATCHES[-1]:
        return [*_BATCHES, *range(_BATCHES[-1] + _BATCH_STEP, most + _BATCH_STEP, _BATCH_STEP)]
    return list(_BATCHES[: bisect_left(_BATCHES, most) + 1])
