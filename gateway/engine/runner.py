"""From a variant's tensors to logits: builds the model, prepares a step's inputs, runs it.

Model code is transformers' own; attention is `gateway.engine.attention`, compressed linears come
from `gateway.engine.kernels`. Owns a model and the input buffers of its steps; decides nothing
about which tokens run (`scheduler`) or which token is picked (`sampler`). One thread at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.base import CompressionError
from compressors.kv_scheme import KVScheme
from compressors.model import build_skeleton, set_tensor
from compressors.tensor import StoredLinear
from gateway.engine import attention, decoder
from gateway.engine.attention import Layout, Mode, Pool, Segment, Slot, Step
from gateway.engine.decoder import Decoder
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.table import TableEmbedding
from gateway.engine.kv_quant import make_pool
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens
from gateway.errors import ModelError

_UNLIMITED_CONTEXT = 4096  # for a config that names no limit
_SERIES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_CONTEXT_STEP = 64  # tokens; context buckets are this times the series
_WINDOW_CHUNK = 256  # tokens at once of a window that goes through the KV cache


@dataclass(frozen=True)
class VariantWeights:
    """A variant's content, as an artifact holds it.

    Attributes:
        config: the transformers config (JSON).
        tensors: parameter name → tensor, mapped from a file and never written to.
        linears: module name → compressed weight; its bias, if any, is in `tensors`.
        dtype: of the computation.
        kv: how keys and values are quantized while it is served; None: not.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears: Mapping[str, StoredLinear]
    dtype: torch.dtype
    kv: KVScheme | None = None


@dataclass(frozen=True)
class Model:
    """A built model: transformers' module with our attention slots.

    Attributes:
        context_length: most tokens of prompt and output together.
        resident_bytes: of all its tensors, those shared with other variants included.
        decoder: its parts, where they could be read; what a thin runner computes from.
    """

    module: nn.Module
    step: Step
    slots: tuple[Slot, ...]
    layout: Layout
    context_length: int
    vocab_size: int
    resident_bytes: int
    decoder: Decoder | None = None


def build_model(weights: VariantWeights, *, device: str = "cpu") -> Model:
    """Assemble a variant: skeleton, compressed linears, plain tensors; then learn its attention.

    Plain tensors that already have the compute dtype are used as they are (pages of the file).

    Raises:
        ModelError: the architecture is not supported, or tensors are missing or misshapen.
    """
    attention.register()
    try:
        module = build_skeleton(
            weights.config, attn_implementation=attention.NAME, dtype=weights.dtype
        )
    except CompressionError as error:
        raise ModelError(str(error)) from error
    config: Any = module.config
    text_config = config.get_text_config()
    _check_config(config, text_config)
    _put_linears(module, weights)
    _put_tensors(module, weights)
    if device == "cpu":
        _put_dense_kernels(module)
    module.to(device)
    # A pad token makes GPT-2 look at its input on every step; nothing here pads with it.
    config.pad_token_id = None
    step = Step()
    slots = tuple(attention.install(module, step))
    vocab_size = _probe(module, slots, text_config.num_hidden_layers, device)
    shapes = tuple(slot.shape for slot in slots if slot.shape is not None)
    limit = getattr(text_config, "max_position_embeddings", None) or _UNLIMITED_CONTEXT
    return Model(
        module=module,
        step=step,
        slots=slots,
        layout=Layout(shapes, weights.dtype, weights.kv),
        context_length=int(limit),
        vocab_size=vocab_size,
        resident_bytes=_resident_bytes(module),
        decoder=decoder.read(module, slots),
    )


@torch.inference_mode()
def forward_logits(model: Model, windows: Tensor) -> Tensor:
    """fp32 logits [n, length, vocab] of whole windows (int64 [n, length]).

    Without a KV pool, unless the model quantizes its keys and values: then through a small one.
    """
    if model.layout.kv is not None:
        return _through_cache(model, windows)
    model.step.mode = Mode.FULL
    device = next(model.module.parameters()).device
    positions = torch.arange(windows.shape[1], device=device).expand(windows.shape[0], -1)
    return _logits(model.module, windows.to(device), positions, 0).float()


def _through_cache(model: Model, windows: Tensor) -> Tensor:
    """`forward_logits` by the engine's own steps, on a pool that holds one window."""
    length = windows.shape[1]
    tail, size = model.layout.tail_blocks, model.layout.block_size(_CONTEXT_STEP)
    blocks = list(range(1 + tail, 1 + tail - (-length // size)))
    device = str(next(model.module.parameters()).device)
    bound = [slot.kv for slot in model.slots]
    runner = Runner(
        model, make_pool(model.layout, len(blocks) + 1 + tail, size, device), max_batch=1
    )
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
        logits = _logits(self.model.module, self._ids[:rows], self._positions[:rows], 0)
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
        logits = _logits(
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


def _logits(module: nn.Module, ids: Tensor, positions: Tensor, keep: int | Tensor) -> Tensor:
    out = module(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        return_dict=True,
    )
    logits: Tensor = out.logits
    return logits


def _buckets(most: int) -> list[int]:
    """The series up to the first number that covers `most`."""
    if most > _SERIES[-1]:
        return [*_SERIES, *range(_SERIES[-1] * 2, most + _SERIES[-1], _SERIES[-1])]
    return list(_SERIES[: bisect_left(_SERIES, most) + 1])


def _check_config(config: Any, text: Any) -> None:
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(f"layers of type {', '.join(sorted(kinds))} are not supported")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("encoder-decoder models are not supported")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError("layers that share keys and values are not supported")


def _put_linears(module: nn.Module, weights: VariantWeights) -> None:
    for name, stored in weights.linears.items():
        parent, _, leaf = name.rpartition(".")
        try:
            old = module.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"the model has no linear {name}") from error
        bias = (
            weights.tensors.get(f"{name}.bias") if getattr(old, "bias", None) is not None else None
        )
        if getattr(old, "bias", None) is not None and bias is None:
            raise ModelError(f"no tensor for parameter {name}.bias")
        try:
            new = make_linear(stored, bias, dtype=weights.dtype)
        except (ValueError, KeyError) as error:
            raise ModelError(f"{name}: {error}") from error
        if stored.scheme == "table":
            _put_table(module, old, new, weights.dtype)
        else:
            setattr(module.get_submodule(parent), leaf, new)


def _put_table(module: nn.Module, old: nn.Module, new: KernelLinear, dtype: torch.dtype) -> None:
    """One table in place of an embedding, of a head, or of both where they are tied."""
    if not isinstance(new, GroupedLinear) or (new.out_features, new.in_features) != tuple(
        old.get_parameter("weight").shape
    ):
        raise ModelError(f"a table of shape {new.extra_repr()} for {old}")
    for name, user in list(module.named_modules()):
        if getattr(user, "weight", None) is not old.weight:
            continue
        parent, _, leaf = name.rpartition(".")
        part: nn.Module = new
        if isinstance(user, nn.Embedding):
            part = TableEmbedding(new, dtype, getattr(user, "embed_scale", 1.0))
        setattr(module.get_submodule(parent), leaf, part)


def _put_tensors(module: nn.Module, weights: VariantWeights) -> None:
    """Fill what is still on the meta device, and persistent buffers that are stored."""
    stored_buffers = set(module.state_dict(keep_vars=True)) & set(dict(module.named_buffers()))
    for name, parameter in _unfilled(module):
        tensor = weights.tensors.get(name)
        if tensor is None:
            raise ModelError(f"no tensor for parameter {name}")
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{name} has shape {list(tensor.shape)}, the config says {list(parameter.shape)}"
            )
        set_tensor(module, name, tensor.to(weights.dtype) if tensor.is_floating_point() else tensor)
    for name in stored_buffers:
        if name in weights.tensors and name.rpartition(".")[0] not in weights.linears:
            set_tensor(module, name, weights.tensors[name])


def _put_dense_kernels(module: nn.Module) -> None:
    """Let uncompressed linears, too, run on our kernels, on the very same weights."""
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear and linear.weight.is_contiguous():
            n, k = linear.weight.shape
            stored = StoredLinear(
                "dense", "rowmajor", {"n": n, "k": k}, {"weight": linear.weight.detach()}
            )
            bias = None if linear.bias is None else linear.bias.detach()
            parent, _, leaf = name.rpartition(".")
            new = make_linear(stored, bias, dtype=linear.weight.dtype)
            setattr(module.get_submodule(parent), leaf, new)


def _unfilled(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters on the meta device; tied ones once."""
    return ((n, p) for n, p in list(module.named_parameters()) if p.is_meta)


@torch.inference_mode()
def _probe(module: nn.Module, slots: Sequence[Slot], layers: int, device: str) -> int:
    """Run one token to learn every layer's heads and windows; returns the vocabulary size."""
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        logits = _logits(module, one, one, 0)
    except (attention.UnsupportedAttention, TypeError, NotImplementedError) as error:
        raise ModelError(f"{type(module).__name__} cannot be served: {error}") from error
    if len(slots) != layers or any(slot.shape is None for slot in slots):
        raise ModelError(f"{type(module).__name__} does not use the attention interface everywhere")
    return int(logits.shape[-1])


def _resident_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    whole = sum(storages.values())
    return min(whole, sum({t.data_ptr(): t.nbytes for t in tensors}.values()))
