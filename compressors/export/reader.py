"""GPTQ checkpoints from elsewhere (AutoGPTQ, GPTQModel, ours), read as canonical forms.

Owns recognising the format in a folder and checking every tensor against the architecture that
the config describes; never writes, never loads pickle, never runs a repository's code. The tensor
layout itself is `autogptq_format`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressors.base import Sink
from compressors.export.autogptq_format import (
    BITS,
    VERSIONS,
    WORD,
    GptqFormatError,
    GptqTensors,
    Version,
    from_gptq,
)
from compressors.export.model import CollectingSink, CompressedModel
from compressors.model import Checkpoint, build_skeleton, linears, weight_of
from compressors.tensor import Grouped

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqConfig:
    """The part of `quantization_config` that decides how tensors are read.

    Attributes:
        bits: of every linear that `overrides` does not name (GPTQModel's `dynamic`).
        group_size: columns per group; -1 for per-channel.
        version: meaning of the stored zero points.
    """

    bits: int
    group_size: int
    version: Version


def gptq_config(folder: str | Path) -> GptqConfig | None:
    """The folder's GPTQ settings, from `config.json` or an older `quantize_config.json`.

    Returns:
        None when the folder holds no GPTQ checkpoint.

    Raises:
        GptqFormatError: it is one, of a kind that cannot be read (Marlin, other bits, bad values).
    """
    root = Path(folder)
    entry = _json(root / "config.json").get("quantization_config")
    if entry is None:
        entry = _json(root / "quantize_config.json")
        if not {"bits", "group_size"} <= entry.keys():
            return None
        entry = {"quant_method": "gptq", **entry}
    if not isinstance(entry, dict) or entry.get("quant_method") != "gptq":
        return None
    layout = entry.get("checkpoint_format") or entry.get("format") or "gptq"
    if entry.get("is_marlin_format"):
        layout = "marlin"
    if layout not in VERSIONS:
        raise GptqFormatError(
            f"{root}: checkpoint_format {layout!r} cannot be read; known: {', '.join(VERSIONS)}"
        )
    bits, group_size = entry.get("bits"), entry.get("group_size")
    if bits not in BITS or isinstance(bits, bool):
        raise GptqFormatError(f"{root}: bits is {bits!r}; the format has {BITS}")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size in (0,):
        raise GptqFormatError(f"{root}: group_size is {group_size!r}, not -1 or a positive number")
    return GptqConfig(bits, group_size, "gptq_v2" if layout == "gptq_v2" else "gptq")


class GptqCheckpoint:
    """A GPTQ folder, opened and checked by name and shape; tensors are unpacked one by one.

    Attributes:
        config: the model's config without `quantization_config`.
        settings: bits, group size, version.
        modules: names of the quantized linears, sorted.

    Raises (on construction):
        GptqFormatError: no GPTQ checkpoint, or tensors that the architecture has no place for.
        compressors.model.CheckpointError: broken or pickle-only files, unknown architecture.
    """

    def __init__(self, folder: str | Path) -> None:
        self._checkpoint = Checkpoint(folder)
        settings = gptq_config(folder)
        if settings is None:
            raise GptqFormatError(f"{folder}: config.json has no quantization_config of GPTQ's")
        self.settings = settings
        self.config: dict[str, Any] = {
            key: value
            for key, value in self._checkpoint.config.items()
            if key not in ("quantization_config", "auto_map")
        }
        names = self._checkpoint.names
        self.modules = tuple(
            name.removesuffix(".qweight") for name in names if name.endswith(".qweight")
        )
        if not self.modules:
            raise GptqFormatError(f"{folder}: not one tensor is named *.qweight")
        self._linears, self._plain = self._match()

    def linear(self, module: str) -> Grouped:
        """The canonical form of one quantized linear.

        Raises:
            GptqFormatError: the message names the module.
        """
        parts = {part: self._part(module, part) for part in _PARTS}
        missing = [part for part in _PARTS[:3] if parts[part] is None]
        if missing:
            raise GptqFormatError(f"{module}.{missing[0]}: missing beside {module}.qweight")
        qweight, qzeros, scales = (_present(parts[part]) for part in _PARTS[:3])
        out_features, in_features = self._linears[module]
        tensors = GptqTensors(qweight, qzeros, scales, parts["g_idx"])
        try:
            bits, group = self._layout(tensors, in_features)
            form = from_gptq(tensors, bits, group, self.settings.version)
        except GptqFormatError as error:
            raise GptqFormatError(f"{module}: {error}") from error
        if form.shape != (out_features, in_features):
            raise GptqFormatError(
                f"{module}: packed weight is {form.shape[0]}x{form.shape[1]}, "
                f"the config says {out_features}x{in_features}"
            )
        return form

    def forms(self) -> Iterator[tuple[str, Grouped]]:
        """Every quantized linear in turn."""
        for module in self.modules:
            yield module, self.linear(module)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every other tensor of the architecture; packers' zero biases and tied copies left out."""
        for name in self._plain:
            yield name, self._checkpoint.tensor(name)

    def stream(self, sink: Sink) -> None:
        """Hand the whole checkpoint to a sink, one linear in memory at a time."""
        sink.config(dict(self.config))
        for name, tensor in self.tensors():
            sink.tensor(name, tensor)
        for module, form in self.forms():
            sink.linear(module, form)

    def _match(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Shapes [N, K] of the quantized linears, and the plain tensors that the model has."""
        skeleton = build_skeleton(self.config)
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in linears(skeleton):
            weight = weight_of(module)
            shapes[name] = (weight.shape[0], weight.shape[1])
        for module_name in self.modules:
            if module_name not in shapes:
                raise GptqFormatError(
                    f"{module_name}.qweight: the architecture has no linear of that name"
                )
        packed = {f"{module}.{part}" for module in self.modules for part in _PARTS}
        parameters = dict(skeleton.named_parameters())
        stored = skeleton.state_dict(keep_vars=True)
        wanted: dict[str, Tensor] = {n: b for n, b in skeleton.named_buffers() if n in stored}
        wanted |= parameters
        plain: list[str] = []
        for name in self._checkpoint.names:
            if name in packed:
                continue
            if name in wanted:
                self._check_shape(name, wanted[name])
                plain.append(name)
        needed = set(parameters) - {f"{module}.weight" for module in self.modules} - set(plain)
        if needed:
            raise GptqFormatError(f"{min(needed)}: missing from the checkpoint")
        return shapes, plain

    def _check_shape(self, name: str, parameter: Tensor) -> None:
        shape = self._checkpoint.shape(name)
        if shape != tuple(parameter.shape):
            raise GptqFormatError(
                f"{name}: shape is {list(shape)}, the config says {list(parameter.shape)}"
            )

    def _part(self, module: str, part: str) -> Tensor | None:
        name = f"{module}.{part}"
        return self._checkpoint.tensor(name) if name in self._checkpoint else None

    def _layout(self, tensors: GptqTensors, in_features: int) -> tuple[int, int]:
        """(bits, group size) of one linear: the tensors' own, as GPTQModel may mix them."""
        if tensors.qweight.ndim != 2 or tensors.scales.ndim != 2:
            raise GptqFormatError("qweight and scales must be matrices")
        bits, rest = divmod(tensors.qweight.shape[0] * WORD, in_features)
        if rest or bits not in BITS:
            raise GptqFormatError(
                f"qweight has {tensors.qweight.shape[0]} rows, which is no packing of "
                f"{in_features} columns"
            )
        groups, group = tensors.scales.shape[0], self.settings.group_size
        group = in_features if group == -1 else group
        if groups and -(-in_features // group) != groups and in_features % groups == 0:
            group = in_features // groups
        return bits, group


def read_gptq(folder: str | Path) -> CompressedModel:
    """A GPTQ folder as config, plain tensors and canonical forms, whole in memory.

    Raises:
        GptqFormatError: not a GPTQ checkpoint, or malformed; the message names the tensor.
        compressors.model.CheckpointError: broken or pickle-only files, unknown architecture.
    """
    sink = CollectingSink()
    GptqCheckpoint(folder).stream(sink)
    return sink.model()


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise GptqFormatError(f"{path}: not readable as JSON: {error}") from error
    return value if isinstance(value, dict) else {}
