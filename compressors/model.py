"""Checkpoints on disk and the transformers modules they fill.

Owns: reading a folder of safetensors safely (never pickle, never a repository's own code), building
the module tree without memory for weights, and finding decoder blocks and linears in any causal LM.
transformers and huggingface_hub are imported here and only when used.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compressors.base import CompressionError
from compressors.experts import expert_name, parts_of, unfuse
from compressors.pages import drop_pages
from compressors.tensor import LinearForm

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# One expert of a fused parameter, some of its rows: `name[3][0:56]`, `name[3].T[0:56]`.
_PART = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\](?P<turn>\.T)?\[(?P<from>\d+):(?P<to>\d+)\]")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CheckpointError(CompressionError, ValueError):
    """The checkpoint cannot be read or is of a kind that is not supported; the message says why."""


def torch_dtype(name: str) -> torch.dtype:
    """`fp32`, `bf16` or `fp16` as a torch dtype."""
    return _DTYPES[name]


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or a download of a hub id (safetensors and text only).

    Raises:
        CheckpointError: no such folder or repository, no access, no network.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise CheckpointError(f"{text}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(text, revision=revision, allow_patterns=list(ALLOW_PATTERNS))
    except HFValidationError as error:
        raise CheckpointError(f"{text}: neither a folder nor a hub id ({error})") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{text}: access to this repository is restricted; accept its terms and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{text}: no such repository on the hub (or it is private)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{text}: no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{text}: not in the local cache and the hub is offline") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{text}: download failed: {error}") from error
    return Path(folder)


class Checkpoint:
    """A local folder with `config.json` and safetensors, opened by memory map and checked whole.

    Attributes:
        folder: where it is.
        config: `config.json`, parsed.
        files: the safetensors files that make it up, sorted.
        forms: linears whose weight stands for a compressed form that later steps start from, by
            module; a folder has none.

    Raises (on construction):
        CheckpointError: missing, pickle only, truncated or inconsistent files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        self.config = _read_json(self.folder / "config.json")
        self.forms: Mapping[str, LinearForm] = {}
        if not isinstance(self.config.get("model_type"), str):
            raise CheckpointError(f"{self.folder}/config.json: no model_type")
        self.files = _weight_files(self.folder)
        self._handles = {file: _open(file) for file in self.files}
        self._home: dict[str, Path] = {}
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118  (a safe_open handle is no dict)
                if name in self._home:
                    raise CheckpointError(
                        f"{name}: in both {self._home[name].name} and {file.name}"
                    )
                self._home[name] = file
        _check_index(self.folder, self._home)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._home))

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def tensor(self, name: str) -> Tensor:
        """The tensor, a view of the mapped file: do not write to it.

        `name[3][0:56]` is a part of a 3-D one (rows 0 to 55 of its fourth matrix), and
        `name[3].T[0:56]` of that matrix transposed.
        """
        if part := self._part(name):
            whole = self.tensor(part["name"])[int(part["index"])]
            return (whole.t() if part["turn"] else whole)[int(part["from"]) : int(part["to"])]
        try:
            tensor: Tensor = self._handles[self._home[name]].get_tensor(name)
        except KeyError:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}") from None
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder}: tensor {name!r}: {error}") from error
        return tensor

    def release(self, name: str) -> None:
        """Let the kernel take back the pages of tensor `name`; reading it again maps them again."""
        part = self._part(name)
        tensor = self.tensor(part["name"] if part else name)
        drop_pages(tensor.data_ptr(), tensor.nbytes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header; no data is read."""
        if part := self._part(name):
            whole = self.shape(part["name"])[1:]
            rows = int(part["to"]) - int(part["from"])
            inner = tuple(reversed(whole)) if part["turn"] else whole
            return (min(rows, inner[0] - int(part["from"])), *inner[1:])
        if name not in self._home:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        return tuple(self._handles[self._home[name]].get_slice(name).get_shape())

    def _part(self, name: str) -> re.Match[str] | None:
        return None if name in self._home else _PART.fullmatch(name)

    @property
    def total_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def source_digest(self) -> str:
        """blake3 (hex) of the configuration and of every byte of the weight files."""
        digest = blake3(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(blake3().update_mmap(file).digest())
        return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if PurePath(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {shard!r} is not the name of a shard")
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder}: shard {shard} is missing")
        return tuple(folder / shard for shard in shards)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return tuple(found)
    if found:
        raise CheckpointError(f"{folder}: several .safetensors files and no {_INDEX}")
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{folder}: holds pickle weights only, which can run code when loaded and are refused; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: no .safetensors file")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or broken safetensors: {error}") from error


def _check_index(folder: Path, home: Mapping[str, Path]) -> None:
    if not (folder / _INDEX).exists():
        return
    for name, shard in _read_json(folder / _INDEX)["weight_map"].items():
        if name not in home or home[name].name != shard:
            raise CheckpointError(f"{folder}: {name} is not in {shard}, where the index says it is")


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
    parsed.dtype = dtype if dtype is not None else (parsed.dtype or torch.float32)
    owner = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        # The hook is global: leave other threads' modules alone, and tied parameters tied.
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    register = nn.modules.module.register_module_parameter_registration_hook
    handle = register(to_meta)
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(
            parsed, attn_implementation=attn_implementation, dtype=parsed.dtype
        )
    except Exception as error:  # so do model classes, on a config they did not expect
        raise CheckpointError(
            f"transformers cannot build a causal LM of model_type {parsed.model_type!r}: {error}"
        ) from error
    finally:
        handle.remove()
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
