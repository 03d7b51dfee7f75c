"""A model read as plain parts: what a step computes, without the Python that transformers runs it
through.

transformers' module stays the truth: `read` only names its parts (embedding, norms, rotations,
linears), for the many families that are built alike, and answers None for any other. Whether the
parts, put together by a runner of ours, still are that model is not believed but measured before
they serve (`runners.settle`). Computes no step itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gateway.engine.attention import Slot

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_PER_HEAD = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles depend on the position only
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Norm:
    """y = x / √(mean(x²) + eps) · weight (RMSNorm, arXiv:1910.07467), weight [n]."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rotary:
    """RoPE (arXiv:2104.09864) on halves: channel i turns with i + dim/2 by position · frequency[i].

    Attributes:
        frequency: float32 [dim / 2].
        scale: multiplies cosines and sines (1 but for YaRN).
    """

    frequency: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Attention:
    """norm → query, key, value (→ a norm of each head) → rotation → attention → output → + x.

    `query` is a module [rows, hidden] → [rows, heads · dim], `key` and `value` likewise with
    kv_heads; `window` is in tokens, None for full attention; `slot` holds the bound KV.
    """

    norm: Norm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    query_norm: Norm | None
    key_norm: Norm | None
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None
    slot: Slot


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(act(gate(x)) · up(x)); `activation` is a value of `ACTIVATIONS`."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: str


@dataclass(frozen=True, slots=True)
class Block:
    """attention, then norm → mlp → + x. An `mlp` of another kind is a module [1, rows, hidden] →
    the same."""

    attention: Attention
    norm: Norm
    mlp: GatedMlp | nn.Module


@dataclass(frozen=True, slots=True)
class Decoder:
    """embed → blocks → norm → head.

    Attributes:
        embed: module, int64 [rows] → [rows, hidden].
        head: module, [rows, hidden] → logits [rows, vocab].
    """

    embed: nn.Module
    blocks: tuple[Block, ...]
    rotary: Rotary
    norm: Norm
    head: nn.Module
    hidden: int


def read(module: nn.Module, slots: Sequence[Slot]) -> Decoder | None:
    """The parts of a causal language model whose slots know their shapes; None: built otherwise."""
    inner: Any = getattr(module, "model", None)
    names = ("embed_tokens", "layers", "norm", "rotary_emb")
    if inner is None or not all(hasattr(inner, name) for name in names):
        return None
    if not hasattr(module, "lm_head") or len(inner.layers) != len(slots):
        return None
    config: Any = module.config
    head: Any = module.lm_head
    blocks = [_block(layer, slot, config) for layer, slot in zip(inner.layers, slots, strict=True)]
    rotary, norm = _rotary(inner.rotary_emb), _norm(inner.norm)
    found = [block for block in blocks if block is not None]
    if len(found) != len(blocks) or rotary is None or norm is None:
        return None
    if any(block.attention.dim != 2 * len(rotary.frequency) for block in found):
        return None
    return Decoder(
        embed=inner.embed_tokens,
        blocks=tuple(found),
        rotary=rotary,
        norm=norm,
        head=head,
        hidden=norm.weight.shape[0],
    )


def _block(layer: Any, slot: Slot, config: Any) -> Block | None:
    if {name for name, _ in layer.named_children()} != _LAYER:
        return None
    attention = _attention(layer.self_attn, layer.input_layernorm, slot)
    norm = _norm(layer.post_attention_layernorm)
    if attention is None or norm is None:
        return None
    return Block(attention, norm, _mlp(layer.mlp, config))


def _attention(module: Any, before: nn.Module, slot: Slot) -> Attention | None:
    children = {name for name, _ in module.named_children()}
    shape = slot.shape
    if shape is None or not _ATTENTION <= children <= _ATTENTION | _PER_HEAD:
        return None
    norm = _norm(before)
    per_head = [_norm(getattr(module, name)) for name in sorted(children & _PER_HEAD)]
    if norm is None or None in per_head or len(per_head) == 1 or shape.key_dim != shape.value_dim:
        return None
    # A norm over all heads at once (OLMo 2) has another length.
    if any(n is not None and n.weight.shape[0] != shape.key_dim for n in per_head):
        return None
    key_norm, query_norm = per_head or (None, None)
    return Attention(
        norm=norm,
        query=module.q_proj,
        key=module.k_proj,
        value=module.v_proj,
        output=module.o_proj,
        query_norm=query_norm,
        key_norm=key_norm,
        heads=module.q_proj.out_features // shape.key_dim,
        kv_heads=shape.kv_heads,
        dim=shape.key_dim,
        scale=float(getattr(module, "scaling", shape.key_dim**-0.5)),
        window=slot.step.windows[slot.window],
        slot=slot,
    )


def _mlp(module: Any, config: Any) -> GatedMlp | nn.Module:
    children = {name for name, _ in module.named_children()}
    activation = ACTIVATIONS.get(getattr(config, "hidden_act", ""))
    if activation is None or children - {"act_fn"} != _MLP:
        found: nn.Module = module
        return found
    return GatedMlp(module.gate_proj, module.up_proj, module.down_proj, activation)


def _rotary(module: Any) -> Rotary | None:
    frequency = getattr(module, "inv_freq", None)
    if not isinstance(frequency, Tensor) or frequency.ndim != 1:
        return None
    if getattr(module, "rope_type", "default") not in _STATIC_ROPE:
        return None
    return Rotary(frequency.float(), float(getattr(module, "attention_scaling", 1.0)))


@torch.inference_mode()
def _norm(module: Any) -> Norm | None:
    """Asked rather than known by name: ones through an RMSNorm give its weights, in whatever way
    it stores them (Gemma adds one)."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    ones = torch.ones(1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    answer = module(ones)[0, 0]
    for candidate in (weight, 1 + weight.float()):
        if torch.allclose(answer.float(), candidate.float(), rtol=1e-2, atol=1e-3):
            return Norm(candidate.detach(), eps)
    return None
