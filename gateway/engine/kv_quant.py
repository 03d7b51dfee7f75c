"""A KV pool of 8- or 4-bit codes: where `quantize.kv`'s bytes lie, and attention to them.

A block is one key group. What a query attends to is fixed by positions alone: keys of complete
groups before its own at the level's bits, keys of its own group at 8 bits per token (the *tail*),
values of every token at the level's bits. So the output of a sequence does not depend on how its
prompt was cut into chunks, on what else was in the batch, on preemption or on a reused prefix, and
only complete blocks, whose bytes are final, are ever shared. KIVI (arXiv:2402.02750) keeps the
newest 32 to 128 keys and values in 16 bits instead; in a pool of many short sequences that window
would cost more than the codes.

A sequence's tail lies in its newest block, where the codes will be (8 bits), or in one more block
of the same pool (4 bits), so one count of blocks accounts for every byte. The step that completes a
group turns the tail into codes; a freed tail needs no care, for nothing reads beyond a position.

Decoding reads only the blocks of the batch, and never makes their dense keys or values: steps and
offsets go into the query and the attention weights, `q·k' = (q s)·code + q·low`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compressors.kv_scheme import KVScheme
from compressors.quantize import kv
from gateway.engine.attention import (
    KVPool,
    LayerShape,
    Layout,
    Pool,
    Rows,
    Scoring,
    Segment,
    Step,
    softmax_attention,
    zeros,
)
from gateway.engine.kernels.kv import KVCall, kv_call

# Codes turned to float at a time on a CPU: what is larger leaves the cache and is slower.
_CPU_CELLS = 1 << 19
_CPU_PIECE = 64  # tokens of a prefill chunk that attend together, a whole number of groups


def make_pool(layout: Layout, num_blocks: int, block_size: int, device: str) -> Pool:
    """The pool that suits the layout; `block_size` is for unquantized ones."""
    if layout.kv is None:
        return KVPool(layout, num_blocks, block_size, device)
    return QuantPool(layout, layout.kv, num_blocks, device)


class QuantPool:
    """`Pool` of quantized keys and values: per layer uint8 [num_blocks, block bytes], zeros."""

    def __init__(self, layout: Layout, scheme: KVScheme, num_blocks: int, device: str) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = scheme.group
        self.device = torch.device(device)
        self.layers = [
            QuantKV(
                zeros(
                    (num_blocks, scheme.block_bytes(s.kv_heads, s.key_dim, s.value_dim)),
                    torch.uint8,
                    device,
                ),
                s,
                scheme,
            )
            for s in layout.layers
        ]

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes(self.block_size)

    def mask(self, start: int, stop: int, window: int | None) -> Tensor:
        """bool [stop - start, past + own]: keys of groups before the last one's as codes, then
        those of the chunk's own groups as the tail has them (see `Pool.mask`)."""
        group = self.block_size
        rows = torch.arange(start, stop, device=self.device)[:, None]
        complete = torch.arange((stop - 1) // group * group, device=self.device)
        own = torch.arange(start // group * group, stop, device=self.device)
        first = rows // group * group  # of the query's own group
        seen = torch.cat((complete < first, (own >= first) & (own <= rows)), 1)
        if window is not None:
            seen &= rows - torch.cat((complete, own)) < window
        return seen

    def clear(self) -> None:
        """See `Pool.clear`."""
        self.layers.clear()


class _Seen(NamedTuple):
    """Keys and values that a chunk may see, each [1, kv_heads, tokens, dim], from position 0 on or,
    `own`, from the start of the chunk's first group on."""

    past_keys: Tensor
    past_values: Tensor
    own_keys: Tensor
    own_values: Tensor


class _Batch(NamedTuple):
    """Rows of a decode step.

    Attributes:
        query: float32 [b, kv_heads, q, key_dim].
        own: float32 [b, kv_heads, group, key_dim]: each row's tail; it stands for the keys of the
            block at `place` (int64 [b]) of its table.
        tables: int64 [b, blocks].
        mask: additive float32 [b, 1, 1, blocks * group].
    """

    query: Tensor
    own: Tensor
    place: Tensor
    tables: Tensor
    mask: Tensor


class QuantKV:
    """`LayerKV` over a layer's blocks.

    A block's bytes: per head the codes and parameters of the group's keys, then per head and token
    those of values; or, in a tail block, per head and token keys at 8 bits.
    """

    def __init__(self, blocks: Tensor, shape: LayerShape, scheme: KVScheme) -> None:
        self._blocks, self._shape, self._scheme = blocks, shape, scheme
        heads, group = shape.kv_heads, scheme.group
        self._room = scheme.key_room(heads, shape.key_dim)
        size = group * scheme.tail_bytes(shape.key_dim)
        tails = blocks[:, : heads * size if scheme.tail_blocks else self._room]
        tails = torch.unflatten(tails, 1, (heads, -1))[..., :size]
        # Views: [blocks, heads, bytes], then twice [blocks, heads, group, bytes].
        self._keys = self._keys_in(blocks)
        self._tails = torch.unflatten(tails, 2, (group, -1))
        self._values = self._values_in(blocks)
        self._native = kv_call(blocks, scheme, heads, (shape.key_dim, shape.value_dim))

    def _keys_in(self, blocks: Tensor) -> Tensor:
        keys = torch.unflatten(blocks[:, : self._room], 1, (self._shape.kv_heads, -1))
        return keys[..., : self._scheme.key_bytes(self._shape.key_dim)]

    def _values_in(self, blocks: Tensor) -> Tensor:
        heads, group = self._shape.kv_heads, self._scheme.group
        size = heads * group * self._scheme.value_bytes(self._shape.value_dim)
        values = blocks[:, self._room : self._room + size]
        return torch.unflatten(values, 1, (heads, group, -1))

    def decode(self, new: Rows, window: int, scoring: Scoring, step: Step) -> Tensor:
        """See `LayerKV.decode`."""
        scheme, shape = self._scheme, self._shape
        if self._native is not None:
            return self._decode_native(self._native, new, step, window, scoring)
        blocks, offsets = step.writes // scheme.group, step.writes % scheme.group
        self._values[blocks, :, offsets] = kv.encode_values(scheme, new.value[:, :, 0].float())
        self._tails[step.tails, :, offsets] = kv.encode_tail(new.key[:, :, 0].float())
        own = kv.decode_tail(self._tails.index_select(0, step.tails), shape.key_dim)
        if step.complete:
            rows = torch.tensor(step.complete, device=own.device)
            self._keys[blocks[rows]] = kv.encode_keys(scheme, own[rows])
        batch, heads, _, dim = new.query.shape
        query = new.query.view(batch, shape.kv_heads, heads // shape.kv_heads, dim).float()
        context = len(step.tables) // batch
        cells = context * scheme.group * shape.kv_heads * max(dim, shape.value_dim)
        at_once = max(1, _CPU_CELLS // cells) if own.is_cpu else batch
        parts = (query, own, step.own, step.tables.view(batch, context), step.masks[window])
        outs = [
            self._attend(_Batch(*(t[at : at + at_once] for t in parts)), scoring)
            for at in range(0, batch, at_once)
        ]
        return torch.cat(outs).to(new.query.dtype).reshape(batch, 1, heads, shape.value_dim)

    def _decode_native(
        self, call: KVCall, new: Rows, step: Step, window: int, scoring: Scoring
    ) -> Tensor:
        query, key, value = new
        out = call(
            (query[:, :, 0], key[:, :, 0], value[:, :, 0]),
            (step.writes, step.tails, step.own, step.tables),
            window=step.windows[window],
            scale=_scale(scoring, self._shape),
            softcap=scoring.softcap,
        )
        return out.to(query.dtype)[:, None]

    def _attend(self, batch: _Batch, scoring: Scoring) -> Tensor:
        """float32 [b, kv_heads, q, value_dim]."""
        scheme, shape = self._scheme, self._shape
        query, own, place, tables, mask = batch
        (rows, context), (heads, per_head) = tables.shape, query.shape[1:3]
        stored = self._blocks.index_select(0, tables.reshape(-1))
        keys = kv.decode_keys(scheme, self._keys_in(stored), shape.key_dim)
        wide = query[:, None].expand(-1, context, -1, -1, -1).flatten(0, 1)
        scores = (wide * keys.step) @ keys.codes.float().transpose(2, 3)
        scores += (wide * keys.low).sum(-1, keepdim=True)
        scores = torch.unflatten(scores, 0, (rows, context)).permute(0, 2, 3, 1, 4).contiguous()
        scores[torch.arange(rows, device=scores.device), :, :, place] = query @ own.transpose(2, 3)
        scores = scores.flatten(3)
        scores *= _scale(scoring, shape)
        if scoring.softcap is not None:
            scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
        weights = torch.softmax(scores + mask, -1)
        weights = torch.unflatten(weights, 3, (context, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        values = kv.decode_values(scheme, self._values_in(stored), shape.value_dim)
        # [blocks, heads, channel groups, queries, tokens] @ [.., tokens, channels of the group]
        step, low = (t.permute(0, 1, 3, 4, 2) for t in (values.step, values.low))
        weights = weights[:, :, None]
        out = (weights * step) @ values.codes.float().transpose(2, 3)
        out += (weights * low).sum(-1, keepdim=True)
        out = torch.unflatten(out, 0, (rows, context)).sum(1).transpose(2, 3)
        return out.reshape(rows, heads, per_head, shape.value_dim)

    def prefill(self, new: Rows, window: int, scoring: Scoring, step: Step) -> Tensor:
        """See `LayerKV.prefill`."""
        scheme, size = self._scheme, self._scheme.group
        values = kv.encode_values(scheme, new.value[0].float().transpose(0, 1))
        self._values[step.writes // size, :, step.writes % size] = values
        outs: list[Tensor] = []
        for segment in step.segments:
            rows = slice(segment.begin, segment.end)
            own = self._store_keys(new.key[0, :, rows].float(), segment)
            seen = self._seen(own, segment, new.query.dtype)
            outs += self._chunk(new.query[:, :, rows], seen, segment, window, scoring)
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _chunk(
        self, query: Tensor, seen: _Seen, segment: Segment, window: int, scoring: Scoring
    ) -> Iterator[Tensor]:
        """Attention of a chunk's rows, [1, heads, rows, value_dim] piece by piece.

        A piece leaves out what none of its rows may see: most keys of the chunk's own groups.
        """
        size, stop = self._scheme.group, segment.start + query.shape[2]
        mask = segment.masks[window]
        assert mask is not None, "groups need a mask"
        columns, first = seen.past_keys.shape[2], segment.start // size * size
        begin = segment.start
        while begin < stop:
            end = min(stop, (begin // _CPU_PIECE + 1) * _CPU_PIECE) if query.is_cpu else stop
            past = (end - 1) // size * size
            own = slice(begin // size * size - first, end - first)
            rows = slice(begin - segment.start, end - segment.start)
            keys = torch.cat((seen.past_keys[:, :, :past], seen.own_keys[:, :, own]), 2)
            values = torch.cat((seen.past_values[:, :, :past], seen.own_values[:, :, own]), 2)
            shown = torch.cat((mask[rows, :past], mask[rows, columns:][:, own]), 1)
            yield softmax_attention(query[:, :, rows], keys, values, shown, scoring)
            begin = end

    def _store_keys(self, keys: Tensor, segment: Segment) -> Tensor:
        """Put a chunk's keys [heads, n, dim] away; all of its groups' as the tail has them,
        [heads, tokens, dim]."""
        size, blocks = self._scheme.group, segment.blocks
        first, before = divmod(segment.start, size)

        def tail(index: int) -> Tensor:
            return self._tails[segment.tail if self._scheme.tail_blocks else blocks[index]]

        encoded = kv.encode_tail(keys)
        if before:
            encoded = torch.cat((tail(first)[:, :before], encoded), 1)
        own = kv.decode_tail(encoded, self._shape.key_dim)
        full, rest = divmod(own.shape[1], size)
        if full:
            groups = torch.unflatten(own[:, : full * size], 1, (full, size)).transpose(0, 1)
            self._keys[blocks[first : first + full]] = kv.encode_keys(self._scheme, groups)
        if rest:
            tail(first + full)[:, :rest] = encoded[:, full * size :]
        return own

    def _seen(self, own: Tensor, segment: Segment, dtype: torch.dtype) -> _Seen:
        """What a chunk may see; `own` is what `_store_keys` gave."""
        shape, size = self._shape, self._scheme.group
        stop = segment.start + segment.end - segment.begin
        complete, first = (stop - 1) // size, segment.start // size
        stored = self._blocks.index_select(0, segment.blocks)
        keys = kv.decode_keys(self._scheme, self._keys_in(stored[:complete]), shape.key_dim)
        values = kv.decode_values(self._scheme, self._values_in(stored), shape.value_dim)
        flat = values.dense().flatten(-2).to(dtype).transpose(0, 1).flatten(1, 2)[None]
        past = keys.dense().to(dtype).transpose(0, 1).flatten(1, 2)[None]
        return _Seen(past, flat, own.to(dtype)[None], flat[:, :, first * size : stop])


def _scale(scoring: Scoring, shape: LayerShape) -> float:
    return shape.key_dim**-0.5 if scoring.scale is None else scoring.scale
