"""From a variant's tensors to a model: transformers' module with our attention and our linears.

Model code is transformers' own; attention is `gateway.engine.attention`, compressed linears come
from `gateway.engine.kernels`. Builds models and runs no step of them.
"""

from __future__ import annotations

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
from gateway.engine.attention import Layout, Slot, Step
from gateway.engine.decoder import Decoder
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.table import TableEmbedding
from gateway.errors import ModelError

_UNLIMITED_CONTEXT = 4096  # for a config that names no limit


@dataclass(frozen=True)
class VariantWeights:
    """A variant's content, as an artifact holds it.

    Attributes:
        config: the transformers config (JSON).
        tensors: parameter name → tensor, mapped from a file and never written to.
        linears: module name → compressed weight; its bias, if any, is in `tensors`.
        dtype: of the computation.
        kv: how keys and values are quantized while it is served; None: not.
        identity: a digest of all of it but dtype and kv; empty where there is none.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears: Mapping[str, StoredLinear]
    dtype: torch.dtype
    kv: KVScheme | None = None
    identity: str = ""


@dataclass(frozen=True)
class Model:
    """A built model: transformers' module with our attention slots, or the module's parts alone.

    Attributes:
        context_length: most tokens of prompt and output together.
        resident_bytes: of all its tensors, those shared with other variants included.
        decoder: its parts, where they could be read; what a thin runner computes from.
        outlined: `module` only holds the parts (see `outline`) and cannot be called.
    """

    module: nn.Module
    step: Step
    slots: tuple[Slot, ...]
    layout: Layout
    context_length: int
    vocab_size: int
    resident_bytes: int
    decoder: Decoder | None = None
    outlined: bool = False


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
        resident_bytes=resident_bytes(module),
        decoder=decoder.read(module, slots),
    )


def logits_of(module: nn.Module, ids: Tensor, positions: Tensor, keep: int | Tensor) -> Tensor:
    """What transformers' causal LM answers to ids at positions, int64 [a, b]; `keep` is its
    `logits_to_keep`."""
    out = module(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        return_dict=True,
    )
    logits: Tensor = out.logits
    return logits


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
            bias = None if linear.bias is None else linear.bias.detach()
            parent, _, leaf = name.rpartition(".")
            new = dense_linear(linear.weight.detach(), bias)
            setattr(module.get_submodule(parent), leaf, new)


def dense_linear(weight: Tensor, bias: Tensor | None) -> KernelLinear:
    """Our kernel over a contiguous weight [N, K], which computes in the weight's dtype."""
    n, k = weight.shape
    stored = StoredLinear("dense", "rowmajor", {"n": n, "k": k}, {"weight": weight})
    return make_linear(stored, bias, dtype=weight.dtype)


def _unfilled(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters on the meta device; tied ones once."""
    return ((n, p) for n, p in list(module.named_parameters()) if p.is_meta)


@torch.inference_mode()
def _probe(module: nn.Module, slots: Sequence[Slot], layers: int, device: str) -> int:
    """Run one token to learn every layer's heads and windows; returns the vocabulary size."""
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        logits = logits_of(module, one, one, 0)
    except (attention.UnsupportedAttention, TypeError, NotImplementedError) as error:
        raise ModelError(f"{type(module).__name__} cannot be served: {error}") from error
    if len(slots) != layers or any(slot.shape is None for slot in slots):
        raise ModelError(f"{type(module).__name__} does not use the attention interface everywhere")
    return int(logits.shape[-1])


def resident_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors, each once; of a larger storage only what they use."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    whole = sum(storages.values())
    return min(whole, sum({t.data_ptr(): t.nbytes for t in tensors}.values()))
