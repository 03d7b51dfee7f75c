"""A model's outline: all that a thin runner needs to know of transformers' module, as plain values.

A decoder read once from the module (`decoder.read`) and settled against it (`runners.settle`) is
built again from its outline and the same tensors without importing transformers, which costs
seconds and over 100 MB. Only shapes and constants are in it, no weights. Whether an outline fits a
variant is the business of who keeps it (`outlines`).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gateway.engine.attention import LayerShape, Layout, Slot, Step
from gateway.engine.decoder import Attention, Block, Decoder, GatedMlp, Norm, Rotary
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.table import TableEmbedding
from gateway.engine.model import Model, VariantWeights, dense_linear, resident_bytes
from gateway.errors import ModelError

_EMBED, _HEAD, _NORM = "model.embed_tokens", "lm_head", "model.norm"


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NormOutline(_Plain):
    """An RMSNorm; `offset`: it is stored less one (Gemma)."""

    eps: float
    offset: bool


class LayerOutline(_Plain):
    """One block; the fields are those of `decoder.Attention` and `decoder.GatedMlp`."""

    norm: NormOutline
    after: NormOutline
    query_norm: NormOutline | None
    key_norm: NormOutline | None
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    dim: int = Field(ge=1)
    scale: float
    window: int | None
    activation: Literal["silu", "gelu_tanh"]


class Outline(_Plain):
    """A decoder of such layers, the embedding before and the head behind them.

    Attributes:
        windows: the distinct attention windows, in the order of `Step.windows`.
        frequency, rotary_scale: as in `decoder.Rotary`.
        embed_scale: factor on looked-up rows of a quantized table.
        computed_bytes: of tensors that the module makes itself (frequencies); counted as resident,
            so that a level has one size however it was built.
    """

    layers: tuple[LayerOutline, ...]
    windows: tuple[int | None, ...]
    frequency: tuple[float, ...]
    rotary_scale: float
    norm: NormOutline
    embed_scale: float
    hidden: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    context_length: int = Field(ge=1)
    computed_bytes: int = Field(ge=0)


def outline_of(model: Model) -> Outline | None:
    """The outline of a model that a thin runner runs; None where values alone do not say it."""
    parts = model.decoder
    if parts is None or model.outlined or not isinstance(parts.head, KernelLinear):
        return None
    if type(parts.embed) not in (nn.Embedding, TableEmbedding):
        return None  # it does more than look up
    layers = [_layer(model.module, index, block) for index, block in enumerate(parts.blocks)]
    known = tuple(layer for layer in layers if layer is not None)
    if len(known) != len(layers):
        return None
    return Outline(
        layers=known,
        windows=tuple(model.step.windows),
        frequency=tuple(parts.rotary.frequency.tolist()),
        rotary_scale=parts.rotary.scale,
        norm=_norm(model.module, _NORM, parts.norm),
        embed_scale=parts.embed.scale if isinstance(parts.embed, TableEmbedding) else 1.0,
        hidden=parts.hidden,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        computed_bytes=sum(b.nbytes for b in _computed(model.module)),
    )


def _computed(module: nn.Module) -> list[Tensor]:
    """Buffers that no checkpoint holds, each memory once."""
    stored = module.state_dict(keep_vars=True)
    computed = [buffer for name, buffer in module.named_buffers() if name not in stored]
    return list({buffer.data_ptr(): buffer for buffer in computed}.values())


def _layer(module: nn.Module, index: int, block: Block) -> LayerOutline | None:
    a, mlp, name = block.attention, block.mlp, f"model.layers.{index}"
    if not isinstance(mlp, GatedMlp):
        return None
    query_norm, key_norm = a.query_norm, a.key_norm
    own = f"{name}.self_attn"
    return LayerOutline(
        norm=_norm(module, f"{name}.input_layernorm", a.norm),
        after=_norm(module, f"{name}.post_attention_layernorm", block.norm),
        query_norm=None if query_norm is None else _norm(module, f"{own}.q_norm", query_norm),
        key_norm=None if key_norm is None else _norm(module, f"{own}.k_norm", key_norm),
        heads=a.heads,
        kv_heads=a.kv_heads,
        dim=a.dim,
        scale=a.scale,
        window=a.window,
        activation="gelu_tanh" if mlp.activation == "gelu_tanh" else "silu",
    )


def _norm(module: nn.Module, name: str, norm: Norm) -> NormOutline:
    stored = module.get_parameter(f"{name}.weight")
    return NormOutline(eps=norm.eps, offset=stored.data_ptr() != norm.weight.data_ptr())


@torch.inference_mode()
def build(outline: Outline, weights: VariantWeights) -> Model:
    """The outlined model over a variant's tensors, used as `model.build_model` uses them.

    Raises:
        ModelError: the tensors are not those of such a model.
    """
    parts = _Parts(weights)
    try:
        step = Step(windows=list(outline.windows))
        slots = tuple(_slot(layer, step) for layer in outline.layers)
        embed, head = parts.ends(outline.embed_scale)
        decoder = Decoder(
            embed=embed,
            blocks=tuple(
                _block(parts, f"model.layers.{index}", layer, slot)
                for index, (layer, slot) in enumerate(zip(outline.layers, slots, strict=True))
            ),
            rotary=Rotary(torch.tensor(outline.frequency), outline.rotary_scale),
            norm=parts.norm(_NORM, outline.norm),
            head=head,
            hidden=outline.hidden,
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"not the outlined model: {error}") from error
    parts.check_all_used()
    shapes = tuple(slot.shape for slot in slots if slot.shape is not None)
    return Model(
        module=parts.held,
        step=step,
        slots=slots,
        layout=Layout(shapes, weights.dtype, weights.kv),
        context_length=outline.context_length,
        vocab_size=outline.vocab_size,
        resident_bytes=resident_bytes(parts.held) + outline.computed_bytes,
        decoder=decoder,
        outlined=True,
    )


def _slot(layer: LayerOutline, step: Step) -> Slot:
    slot = Slot(step)
    slot.shape = LayerShape(layer.kv_heads, layer.dim, layer.dim)
    slot.window = step.windows.index(layer.window)
    return slot


def _block(parts: _Parts, name: str, layer: LayerOutline, slot: Slot) -> Block:
    own, mlp = f"{name}.self_attn", f"{name}.mlp"
    query_norm, key_norm = layer.query_norm, layer.key_norm
    attention = Attention(
        norm=parts.norm(f"{name}.input_layernorm", layer.norm),
        query=parts.linear(f"{own}.q_proj"),
        key=parts.linear(f"{own}.k_proj"),
        value=parts.linear(f"{own}.v_proj"),
        output=parts.linear(f"{own}.o_proj"),
        query_norm=None if query_norm is None else parts.norm(f"{own}.q_norm", query_norm),
        key_norm=None if key_norm is None else parts.norm(f"{own}.k_norm", key_norm),
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        dim=layer.dim,
        scale=layer.scale,
        window=layer.window,
        slot=slot,
    )
    return Block(
        attention=attention,
        norm=parts.norm(f"{name}.post_attention_layernorm", layer.after),
        mlp=GatedMlp(
            gate=parts.linear(f"{mlp}.gate_proj"),
            up=parts.linear(f"{mlp}.up_proj"),
            down=parts.linear(f"{mlp}.down_proj"),
            activation=layer.activation,
        ),
    )


class _Parts:
    """Makes modules of a variant's tensors by their names, and notes which were used.

    Attributes:
        held: all that was made; what a model's parts live in.
    """

    def __init__(self, weights: VariantWeights) -> None:
        self._weights = weights
        self._unused = {*weights.tensors, *weights.linears}
        self.held = nn.ModuleList()

    def _plain(self, name: str) -> Tensor:
        self._unused.discard(name)
        tensor = self._weights.tensors[name]
        return tensor.to(self._weights.dtype) if tensor.is_floating_point() else tensor

    def linear(self, name: str) -> KernelLinear:
        stored, bias = self._weights.linears.get(name), None
        if stored is None:
            if f"{name}.bias" in self._weights.tensors:
                bias = self._plain(f"{name}.bias")
            weight = self._plain(f"{name}.weight")
            if not weight.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
            made = dense_linear(weight, bias)
        else:
            self._unused.discard(name)
            if f"{name}.bias" in self._weights.tensors:
                self._unused.discard(f"{name}.bias")
                bias = self._weights.tensors[f"{name}.bias"]
            made = make_linear(stored, bias, dtype=self._weights.dtype)
        self.held.append(made)
        return made

    def norm(self, name: str, norm: NormOutline) -> Norm:
        stored = self._plain(f"{name}.weight")
        holder = nn.ParameterList([nn.Parameter(stored, requires_grad=False)])
        self.held.append(holder)
        return Norm(1 + stored.float() if norm.offset else stored, norm.eps)

    def ends(self, scale: float) -> tuple[nn.Module, KernelLinear]:
        """Embedding and head; where only one of them is stored, they are tied."""
        stored = [name for name in (_EMBED, _HEAD) if self._has(name)]
        if not stored:
            raise ValueError("neither embedding nor head")
        source, tied = stored[0], len(stored) == 1
        head = self.linear(stored[-1])
        if table := self._weights.linears.get(source):
            codes = head if tied else self.linear(source)
            if table.scheme != "table" or not isinstance(codes, GroupedLinear):
                raise ValueError(f"{source} is no table")
            return TableEmbedding(codes, self._weights.dtype, scale), head
        weight = head.get_buffer("weight") if tied else self._plain(f"{source}.weight")
        rows, width = weight.shape
        embed = nn.Embedding(rows, width, _weight=weight, _freeze=True)
        self.held.append(embed)
        return embed, head

    def _has(self, name: str) -> bool:
        return name in self._weights.linears or f"{name}.weight" in self._weights.tensors

    def check_all_used(self) -> None:
        """Raises: ModelError: a tensor belongs to no part."""
        if self._unused:
            raise ModelError(f"not the outlined model: {min(self._unused)} is no part of it")
