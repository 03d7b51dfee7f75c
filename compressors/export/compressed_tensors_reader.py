"""compressed-tensors checkpoints (llm-compressor, ours), read as canonical forms.

Owns what `quantization_config` may say. Which group of settings a linear belongs to is told by its
own tensors, so the file's target patterns are never run. Tensor layouts are
`compressed_tensors_format`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressors.export.autogptq_format import WORD
from compressors.export.compressed_tensors_format import PARTS, WeightArgs, unpack
from compressors.export.names import level_name
from compressors.export.packed import FormatError, PackedCheckpoint
from compressors.tensor import LinearForm

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
_STRATEGIES = ("tensor", "channel", "group")
_DTYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}


class CompressedTensorsCheckpoint(PackedCheckpoint):
    """A compressed-tensors folder.

    Attributes:
        declared: the settings of every config group.

    Raises (on construction):
        FormatError: settings or tensors that cannot be read; the message says what can.
    """

    parts = PARTS
    marker = "weight_scale"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        entry = self._checkpoint.config.get("quantization_config")
        try:
            self.declared = declared_args(entry)
        except FormatError as error:
            raise FormatError(f"{folder}: {error}") from error

    @property
    def level(self) -> str:
        used = Counter(self._args_of(module) for module in self.modules)
        args, _ = used.most_common(1)[0]
        if args.type == "float":
            return "fp8"
        if args.inputs and args.symmetric and not args.group and args.bits == 8:
            return "w8a8"
        return level_name("rtn", args.bits, args.group or None, symmetric=args.symmetric)

    def unpack(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> LinearForm:
        """See `PackedCheckpoint`."""
        return unpack(stored, shape, self._fitting(stored, shape))

    def _args_of(self, module: str) -> WeightArgs:
        """The settings of one linear."""
        try:
            return self._fitting(self.stored(module), self.shapes[module])
        except FormatError as error:
            raise FormatError(f"{module}: {error}") from error

    def _fitting(self, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> WeightArgs:
        """The one group of settings that these tensors fit."""
        fitting = {args for args in self.declared if _fits(args, stored, shape)}
        if len(fitting) != 1:
            found = ", ".join(
                f"{part} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                for part, tensor in sorted(stored.items())
            )
            raise FormatError(
                f"{found} fit {len(fitting)} of the config's {len(self.declared)} groups for a "
                f"layer of {shape[0]}x{shape[1]}"
            )
        return fitting.pop()


def declared_args(entry: object) -> tuple[WeightArgs, ...]:
    """The weight settings of every config group.

    Raises:
        FormatError: not compressed-tensors, or of a kind that cannot be read.
    """
    if not isinstance(entry, dict) or entry.get("quant_method") != "compressed-tensors":
        raise FormatError("config.json has no quantization_config of compressed-tensors'")
    _known("format", entry.get("format", "pack-quantized"))
    sparsity = entry.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise FormatError(f"sparsity format {sparsity['format']!r} cannot be read; known: dense")
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError("config_groups is missing or empty")
    return tuple(_group_args(str(name), group) for name, group in groups.items())


def _known(what: str, value: object) -> None:
    if value not in FORMATS:
        raise FormatError(f"{what} {value!r} cannot be read; known: {', '.join(FORMATS)}")


def _group_args(name: str, group: object) -> WeightArgs:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise FormatError(f"config_groups.{name}: no settings of weights")
    if group.get("format") is not None:
        _known(f"config_groups.{name}: format", group["format"])
    weights, inputs = group["weights"], group.get("input_activations")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind not in ("int", "float") or isinstance(bits, bool) or not isinstance(bits, int):
        raise FormatError(f"config_groups.{name}: weights of type {kind!r} with {bits!r} bits")
    if not 2 <= bits <= 8 or (kind == "float" and bits != 8):
        raise FormatError(
            f"config_groups.{name}: {kind} weights of {bits} bits; known: int of 2 to 8, float of 8"
        )
    if inputs is not None and (
        not isinstance(inputs, dict)
        or (inputs.get("type", "int"), inputs.get("num_bits")) != (kind, 8)
    ):
        raise FormatError(
            f"config_groups.{name}: inputs in another type than the weights or in other than 8 bits"
        )
    return WeightArgs(
        kind,
        bits,
        _group_columns(name, weights),
        symmetric=bool(weights.get("symmetric", True)),
        inputs=inputs is not None,
    )


def _group_columns(name: str, weights: Mapping[str, Any]) -> int | None:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy not in _STRATEGIES:
        raise FormatError(
            f"config_groups.{name}: strategy {strategy!r} cannot be read; known: "
            f"{', '.join(_STRATEGIES)}"
        )
    if strategy != "group":
        return None if strategy == "channel" else 0
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise FormatError(f"config_groups.{name}: group_size is {size!r}, not a positive number")
    return size


def _fits(args: WeightArgs, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> bool:
    n, k = shape
    counts = {1, n} if args.group == 0 else {n * (-(-k // args.group) if args.group else 1)}
    if "weight_scale" not in stored or stored["weight_scale"].numel() not in counts:
        return False
    if not args.symmetric and "weight_zero_point" not in stored:
        return False
    if "weight_packed" in stored:
        words = -(-k * args.bits // WORD)
        return args.type == "int" and tuple(stored["weight_packed"].shape) == (n, words)
    return "weight" in stored and stored["weight"].dtype == _DTYPES[args.type]
