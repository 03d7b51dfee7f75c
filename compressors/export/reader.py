"""GPTQ checkpoints from elsewhere (AutoGPTQ, GPTQModel, ours), read as canonical forms.

Owns recognising the format in a folder; matching with the architecture is `packed`'s, the tensor
layout `autogptq_format`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressors.export.autogptq_format import (
    BITS,
    VERSIONS,
    WORD,
    GptqFormatError,
    GptqTensors,
    Version,
    from_gptq,
)
from compressors.export.model import CompressedModel
from compressors.export.names import level_name
from compressors.export.packed import PackedCheckpoint, take
from compressors.tensor import Grouped


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


class GptqCheckpoint(PackedCheckpoint):
    """A GPTQ folder, opened and checked by name and shape; tensors are unpacked one by one.

    Attributes:
        settings: bits, group size, version.

    Raises (on construction):
        GptqFormatError: no GPTQ checkpoint, or tensors that the architecture has no place for.
        compressors.checkpoint.CheckpointError: broken or pickle-only files, unknown architecture.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")
    marker = "qweight"
    error = GptqFormatError

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        settings = gptq_config(folder)
        if settings is None:
            raise GptqFormatError(f"{folder}: config.json has no quantization_config of GPTQ's")
        self.settings = settings

    @property
    def level(self) -> str:
        return level_name("gptq", self.settings.bits, self.settings.group_size)

    def unpack(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Grouped:
        """See `PackedCheckpoint`."""
        tensors = GptqTensors(
            take(stored, "qweight"),
            take(stored, "qzeros"),
            take(stored, "scales"),
            stored.get("g_idx"),
        )
        bits, group = self._layout(tensors, shape[1])
        return from_gptq(tensors, bits, group, self.settings.version)

    def forms(self) -> Iterator[tuple[str, Grouped]]:
        """Every quantized linear in turn; the format has groups only."""
        for module, form in super().forms():
            assert isinstance(form, Grouped)
            yield module, form

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
        compressors.checkpoint.CheckpointError: broken or pickle-only files, unknown architecture.
    """
    return GptqCheckpoint(folder).read()


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise GptqFormatError(f"{path}: not readable as JSON: {error}") from error
    return value if isinstance(value, dict) else {}
