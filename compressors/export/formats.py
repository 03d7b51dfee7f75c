"""The table of checkpoint formats: which can be read, which can be written. Torch-free.

Adding one is one file and one line here.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressors.export.model import CompressedModel
    from compressors.export.packed import PackedCheckpoint

_HERE = "compressors.export"
# `quant_method` of a config → class that reads it.
READERS: dict[str, str] = {
    "gptq": f"{_HERE}.reader:GptqCheckpoint",
    "awq": f"{_HERE}.awq:AwqCheckpoint",
    "compressed-tensors": f"{_HERE}.compressed_tensors_reader:CompressedTensorsCheckpoint",
}
# Name of a format → function that writes it.
WRITERS: dict[str, str] = {
    "compressed-tensors": f"{_HERE}.compressed_tensors_writer:write_compressed_tensors",
    "gptq": f"{_HERE}.writer:write_gptq",
}


def open_packed(folder: str | Path) -> PackedCheckpoint | None:
    """The compressed checkpoint in `folder`; None when it holds a dense one.

    Raises:
        CompressionError: it is compressed in a way that cannot be read; the message says what can.
    """
    from compressors.export.packed import FormatError
    from compressors.export.reader import gptq_config

    entry = _config(Path(folder)).get("quantization_config")
    if entry is None:  # old GPTQ folders have a file of their own
        return None if gptq_config(folder) is None else _opened("gptq", folder)
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method not in READERS:
        raise FormatError(
            f"{folder}: a checkpoint quantized by {method!r} cannot be read; "
            f"known: {', '.join(READERS)}, or a dense one"
        )
    return _opened(method, folder)


def write_packed(
    folder: str | Path, model: CompressedModel, *, form: str, tokenizer_from: str | Path
) -> Path:
    """Write `model` as a checkpoint folder in the format called `form`, with its tokenizer.

    Raises:
        CompressionError: the format cannot hold the model; the message names the layer and why.
        FileExistsError: the folder exists.
    """
    written: Path = _load(WRITERS[form])(folder, model, tokenizer_from=tokenizer_from)
    return written


def _opened(method: str, folder: str | Path) -> PackedCheckpoint:
    checkpoint: PackedCheckpoint = _load(READERS[method])(folder)
    return checkpoint


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _config(folder: Path) -> dict[str, Any]:
    """`config.json`, empty when there is none worth the name: opening it says what is wrong."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
