"""Our attention inside transformers' models: paged keys and values, one function for every layer.

transformers hands each layer's queries, keys and values to the function registered under `NAME`.
It writes the new keys and values into the KV pool and attends through block tables (PagedAttention,
Kwon et al. 2023, https://arxiv.org/abs/2309.06180). No mask function is registered, so models build
no mask; causality, sliding windows and padding are ours. What a step needs is put into `Step`
before the model runs; a layer reads tensors from it and decides nothing, so that the decode step
can be captured.

Owns the pool's tensors; knows nothing of sequences, schedules or requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressors.kv_scheme import KVScheme

NAME = "pressgate"
_SLOT = "pressgate_slot"
_FOREIGN = ("s_aux", "position_bias", "cu_seqlens_q", "cache")  # arguments that change the result


class UnsupportedAttention(Exception):
    """The model's attention does something this engine does not do; the message says what."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads and head sizes of one layer's keys and values."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What makes two variants' KV blocks the same: every layer's shape, the dtype, and how keys
    and values are quantized (None: they are not)."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    kv: KVScheme | None = None

    def block_size(self, preferred: int) -> int:
        """Tokens of a block: a quantized one is one group of keys."""
        return preferred if self.kv is None else self.kv.group

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block over all layers."""
        if self.kv is not None:
            return sum(self.kv.block_bytes(s.kv_heads, s.key_dim, s.value_dim) for s in self.layers)
        values = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.layers)
        return values * block_size * self.dtype.itemsize

    @property
    def tail_blocks(self) -> int:
        """Blocks that a running sequence holds besides those of its tokens."""
        return 0 if self.kv is None else self.kv.tail_blocks


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A tensor of zeros whose memory is taken when it is used."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages, which cost nothing until they are used;
    # torch.zeros would write them all: half a second a gigabyte, in the engine's thread.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


class LayerKV(Protocol):
    """One layer's keys and values in a pool, and attention to them.

    Both take the new tokens' query, key and value, [a, heads, b, dim] with a * b rows, store the
    latter two, and return what the rows attend to, [a, b, heads, value_dim].
    """

    def decode(self, new: Rows, window: int, scoring: Scoring, step: Step) -> Tensor:
        """[batch, 1]: one new token per row."""
        ...

    def prefill(self, new: Rows, window: int, scoring: Scoring, step: Step) -> Tensor:
        """[1, tokens]: the step's segments."""
        ...


class Pool(Protocol):
    """The tensors of all layers for one layout."""

    layout: Layout
    num_blocks: int
    block_size: int
    device: torch.device

    @property
    def layers(self) -> Sequence[LayerKV]: ...

    @property
    def nbytes(self) -> int: ...

    def mask(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """What a prefill of positions [start, stop) may see; None where plain causality over the
        chunk itself says it all."""
        ...

    def clear(self) -> None:
        """Let go of the tensors."""
        ...


class KVPool:
    """Keys and values as they are: per layer [num_blocks, block_size, kv_heads, dim].

    Zero-filled, because padding must never read a NaN.
    """

    def __init__(self, layout: Layout, num_blocks: int, block_size: int, device: str) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)

        def make(heads: int, dim: int) -> Tensor:
            return zeros((num_blocks, block_size, heads, dim), layout.dtype, device)

        self.layers = [
            PlainKV(make(shape.kv_heads, shape.key_dim), make(shape.kv_heads, shape.value_dim))
            for shape in layout.layers
        ]

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes(self.block_size)

    def mask(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """bool [stop - start, stop] (see `Pool.mask`)."""
        if start == 0 and (window is None or stop <= window):
            return None
        return allowed(torch.arange(start, stop, device=self.device), stop, window)

    def clear(self) -> None:
        """See `Pool.clear`."""
        self.layers.clear()


class Mode(Enum):
    FULL = auto()  # plain causal attention over the rows themselves, no KV pool
    DECODE = auto()  # [batch, 1]: one new token per row
    PREFILL = auto()  # [1, tokens]: chunks of several sequences, one after the other


@dataclass(slots=True)
class Segment:
    """One sequence's chunk in a packed prefill: rows [begin, end), the first at position `start`.

    `blocks` is its block table, `tail` its tail block (0: none); `masks[w]` is `Pool.mask` under
    the model's w-th window.
    """

    begin: int
    end: int
    start: int
    blocks: Tensor
    masks: list[Tensor | None]
    tail: int = 0


@dataclass(slots=True)
class Step:
    """Inputs of the step that runs now, shared by all layers of one model.

    Attributes:
        writes: int64 [rows]: flat pool slot of each new token.
        tables: int64 [batch * blocks]: block table of each row, padded with block 0 (decode).
        masks: per window, additive [batch, 1, 1, blocks * block_size] (decode); fp32 on the CPU.
        tails: int64 [batch]: block that holds the keys of each row's incomplete group (decode,
            quantized pools).
        own: int64 [batch]: place of that group in the row's table (likewise).
        complete: rows whose token completes a group (decode, quantized pools).
        segments: the packed chunks (prefill).
        windows: the distinct sliding windows of the layers; None is full attention.
    """

    mode: Mode = Mode.FULL
    writes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    tables: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    tails: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    own: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    complete: list[int] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


class Rows(NamedTuple):
    """The new tokens of a step: query [a, heads, b, dim], key and value [a, kv_heads, b, dim]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Scoring(NamedTuple):
    """How scores become weights: `scale` (None: 1/√dim) and Gemma 2's `softcap`."""

    scale: float | None
    softcap: float | None


class Slot:
    """One attention layer's place: its part of the pool, its window and the shared step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.window = 0  # index into step.windows
        self.shape: LayerShape | None = None
        self.kv: LayerKV | None = None

    def learn(self, key: Tensor, value: Tensor, window: int | None) -> None:
        """Note the layer's shape and window on the first, pool-less call."""
        self.shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        if window not in self.step.windows:
            self.step.windows.append(window)
        self.window = self.step.windows.index(window)


class PlainKV:
    """`LayerKV` of unquantized keys and values, each [num_blocks, block_size, kv_heads, dim]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def decode(self, new: Rows, window: int, scoring: Scoring, step: Step) -> Tensor:
        """See `LayerKV.decode`."""
        self._write(new, step)
        query = new.query
        batch, heads, _, dim = query.shape
        keys, values = self._gather(step.tables, batch)
        # Heads that share a KV head become its query rows: grouped-query attention without copies.
        grouped = query.view(batch, keys.shape[1], heads // keys.shape[1], dim)
        if keys.is_cpu and keys.dtype is not torch.float32:
            # torch's CPU kernels for one query in bf16 take 2-3 times as long as converting it.
            grouped, keys, values = grouped.float(), keys.float(), values.float()
        out = softmax_attention(grouped, keys, values, step.masks[window], scoring)
        return out.to(query.dtype).reshape(batch, 1, heads, values.shape[3])

    def prefill(self, new: Rows, window: int, scoring: Scoring, step: Step) -> Tensor:
        """See `LayerKV.prefill`."""
        self._write(new, step)
        outs = []
        for segment in step.segments:
            rows = slice(segment.begin, segment.end)
            if segment.start == 0:
                keys, values = new.key[:, :, rows], new.value[:, :, rows]
            else:
                keys, values = self._gather(segment.blocks, 1)
                length = segment.start + segment.end - segment.begin
                keys, values = keys[:, :, :length], values[:, :, :length]
            mask = segment.masks[window]
            outs.append(softmax_attention(new.query[:, :, rows], keys, values, mask, scoring))
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _write(self, new: Rows, step: Step) -> None:
        writes = step.writes
        for pool, rows in ((self.keys, new.key), (self.values, new.value)):
            flat = rows.transpose(1, 2).reshape(writes.shape[0], *pool.shape[2:])
            pool.view(-1, *pool.shape[2:]).index_copy_(0, writes, flat)

    def _gather(self, tables: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `batch` equally long block tables, each [batch, kv_heads, n, dim]."""
        keys, values = (
            pool.index_select(0, tables).view(batch, -1, *pool.shape[2:]).transpose(1, 2)
            for pool in (self.keys, self.values)
        )
        return keys, values


def install(model: nn.Module, step: Step) -> list[Slot]:
    """Attach a slot to every attention layer of `model`; returns them by layer index."""
    slots: dict[int, Slot] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            setattr(module, _SLOT, slots.setdefault(index, Slot(step)))
    return [slots[index] for index in sorted(slots)]


def register() -> None:
    """Make `NAME` a known attention implementation of transformers. Idempotent."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [b, heads, t, dim] in, [b, t, heads, dim] out.

    Of `options`, `scaling`, `softcap` and `sliding_window` are respected; what would change the
    result otherwise is refused on the first call.
    """
    slot: Slot = getattr(module, _SLOT)
    if slot.shape is None:
        _refuse_foreign(attention_mask, options)
        slot.learn(key, value, options.get("sliding_window"))
    scoring = Scoring(options.get("scaling"), options.get("softcap"))
    step = slot.step
    if step.mode is Mode.FULL:
        mask = _full_mask(query.shape[2], step.windows[slot.window], query.device)
        return softmax_attention(query, key, value, mask, scoring).transpose(1, 2), None
    assert slot.kv is not None, "a step with a pool needs a bound pool"
    run = slot.kv.decode if step.mode is Mode.DECODE else slot.kv.prefill
    return run(Rows(query, key, value), slot.window, scoring, step), None


def _refuse_foreign(attention_mask: Tensor | None, options: Mapping[str, Any]) -> None:
    foreign = [name for name in _FOREIGN if options.get(name) is not None]
    if attention_mask is not None:
        foreign.append("attention_mask")
    if foreign:
        raise UnsupportedAttention(f"attention with {', '.join(foreign)} is not supported")


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """softmax(cap(q kᵀ · scale) + mask) v; no mask means causal."""
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scoring.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = query @ key.transpose(2, 3) * scale
    scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is None:
        mask = allowed(torch.arange(query.shape[2], device=query.device), query.shape[2], None)
    hidden = float("-inf")
    scores = scores.masked_fill(~mask, hidden) if mask.dtype is torch.bool else scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


def _full_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal mask with `window` over one whole row; None where plain causality says it all."""
    if window is None:
        return None
    positions = torch.arange(length, device=device)
    return allowed(positions, length, window)


def allowed(positions: Tensor, length: int, window: int | None) -> Tensor:
    """bool [rows, length]: may the query at `positions[i]` see the key at position j."""
    behind = positions[:, None] - torch.arange(length, device=positions.device)
    mask = behind >= 0
    if window is not None:
        mask &= behind < window
    return mask
