"""The transformers modules that a checkpoint fills, of any causal LM.

Owns building the module tree without memory for weights (never a repository's own code), which
stored tensor fills which parameter, and finding decoder blocks and linears. transformers is
imported here and only when used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.checkpoint import Checkpoint, CheckpointError
from compressors.experts import expert_name, parts_of, unfuse

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """`fp32`, `bf16` or `fp16` as a torch dtype."""
    return _DTYPES[name]


def parse_config(config: Mapping[str, Any]) -> Any:
    """The transformers config object of a parsed `config.json`.

    Raises:
        CheckpointError: an architecture that transformers has no code of its own for.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = " (its repository brings its own code, which is never run)"
        raise CheckpointError(
            f"unknown model_type {model_type!r}{hint if 'auto_map' in config else ''}"
        )
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except Exception as error:  # config classes raise whatever their checks stumble over
        raise CheckpointError(f"config.json is not a valid {model_type} config: {error}") from error


def build_skeleton(
    config: Mapping[str, Any],
    *,
    attn_implementation: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The causal LM of `config` with every parameter on the meta device and every buffer real.

    Buffers (rotary frequencies, masks) are computed by the constructors and are in no checkpoint,
    so they must exist; parameters cost nothing until `set_tensor` fills them. Layers of experts
    come as linears (see `experts`).

    Args:
        attn_implementation: None lets transformers choose the best that the architecture has.
        dtype: of the parameters; None is the config's.

    Raises:
        CheckpointError: unknown architecture, or a config that its class refuses.
    """
    from transformers import AutoModelForCausalLM

    parsed = parse_config(config)
    wanted = dtype if dtype is not None else (parsed.dtype or torch.float32)
    owner = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        # The hook is global: leave other threads' modules alone, and tied parameters tied.
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None
        kind = wanted if parameter.dtype is torch.float32 else parameter.dtype
        empty = nn.Parameter(parameter.to("meta", kind), requires_grad=False)
        # Drawing weights for the meta device takes longer than all the rest and imports dynamo.
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        return empty

    register = nn.modules.module.register_module_parameter_registration_hook
    handle = register(to_meta)
    try:
        # Of another dtype transformers would make the default of the whole process meanwhile, and
        # tensors that other threads make beside would have it.
        model: nn.Module = AutoModelForCausalLM.from_config(
            parsed, attn_implementation=attn_implementation, dtype=torch.float32
        )
    except Exception as error:  # so do model classes, on a config they did not expect
        raise CheckpointError(
            f"transformers cannot build a causal LM of model_type {parsed.model_type!r}: {error}"
        ) from error
    finally:
        handle.remove()
    for part in (parsed, *(getattr(parsed, name) for name in parsed.sub_configs)):
        if part is not None:
            part.dtype = wanted
    unfuse(model)
    return model.eval().requires_grad_(False)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in place of a parameter or buffer, in every module that shares it (tying)."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    old = module._parameters[leaf]
    new = nn.Parameter(tensor, requires_grad=False)
    module._parameters[leaf] = new
    # Meta parameters that are tied are one object; an untied one belongs to a single module.
    for other in model.modules():
        for key, parameter in other._parameters.items():
            if parameter is old and old is not None:
                other._parameters[key] = new


def source_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Name of every parameter and persistent buffer of `model` → its name in the checkpoint.

    Tied parameters appear once. Names of older checkpoints are understood as transformers does
    (`embed_out`, or a base model's without its prefix). Persistent buffers that are not stored keep
    their built value.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored_as = _current_names(checkpoint, model)
    fused = parts_of(model)
    parameters = dict(model.named_parameters())
    wanted: dict[str, Tensor] = dict(parameters)
    stored = model.state_dict(keep_vars=True)
    wanted |= {n: b for n, b in model.named_buffers() if n in stored}
    names: dict[str, str] = {}
    for name, tensor in wanted.items():
        found = _stored_name(name, prefix, stored_as)
        if found is None and name in fused:
            whole, part = fused[name]
            merged = _stored_name(whole, prefix, stored_as)
            found = None if merged is None else part.of(merged)
        if found is None:
            if name in parameters:
                raise CheckpointError(f"{checkpoint.folder}: no tensor for parameter {name}")
            continue
        if checkpoint.shape(found) != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {found} has shape {list(checkpoint.shape(found))}, "
                f"the config says {list(tensor.shape)}"
            )
        names[name] = found
    return names


def _stored_name(name: str, prefix: str, stored_as: Mapping[str, str]) -> str | None:
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((stored_as[c] for c in candidates if c in stored_as), None)


def _current_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Today's name of every stored tensor → the name it is stored under."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    merges = [
        t
        for t in transforms
        if isinstance(t, WeightConverter) and isinstance(t.operations[0], MergeModulelist)
    ]
    names = {}
    for stored in checkpoint.names:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for merge in merges:  # one matrix of one expert
            fused, pattern = merge.rename_source_key(name)
            if pattern is not None:
                place = merge.source_patterns.index(pattern)
                name = expert_name(name, fused, pattern, place) or name
                break
        names[name] = stored
    return names


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model: `path` of their ModuleList, e.g. `model.layers`, and it."""

    path: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)

    def prefix(self, index: int) -> str:
        """Name of block `index` in the model."""
        return f"{self.path}.{index}"


def decoder_blocks(model: nn.Module) -> Blocks:
    """The stack of decoder blocks: the ModuleList of equal-class modules with the most weights.

    Raises:
        CheckpointError: there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        size = sum(p.numel() for p in module.parameters())
        if best is None or size > best[0]:
            best = (size, path, module)
    if best is None:
        raise CheckpointError(f"{type(model).__name__}: no stack of equal decoder blocks")
    return Blocks(best[1], best[2])


def block_share(model: nn.Module) -> float:
    """The share of the model's parameters that its decoder blocks hold, 0..1."""
    inside = sum(p.numel() for p in decoder_blocks(model).modules.parameters())
    return inside / max(1, sum(p.numel() for p in model.parameters()))


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is GPT-2's Conv1D, which keeps its weight as [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear inside `root`, as (name, module): `nn.Linear` and GPT-2's Conv1D."""
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear) or is_transposed(module):
            yield name, module


def weight_of(module: nn.Module, tensor: Tensor | None = None) -> Tensor:
    """The linear's weight (or `tensor` in its place) as [N, K], a view."""
    weight = module.get_parameter("weight") if tensor is None else tensor
    return weight.t() if is_transposed(module) else weight
