"""A Hugging Face model folder, written whole or not at all.

Owns the files' names and shards; what the tensors mean is the formats' business. Written into a
temporary folder beside the target and moved into place, so a folder that exists is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 2**30
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Draft:
    """What goes into a folder.

    Attributes:
        config: `config.json`.
        tensors: name and tensor, consumed once; one shard of them is in memory at a time.
        files: further JSON files by name.
    """

    config: Mapping[str, Any]
    tensors: Iterable[tuple[str, Tensor]]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_folder(
    folder: str | Path,
    draft: Draft,
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `draft` as the folder, which must not exist yet.

    Args:
        tokenizer_from: folder whose tokenizer files are copied along.
        shard_bytes: largest size of one file (a single larger tensor still makes one file).

    Raises:
        FileExistsError: the folder exists.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        work = Path(scratch) / target.name
        work.mkdir()
        _write_json(work / "config.json", draft.config)
        for name, content in draft.files.items():
            _write_json(work / name, content)
        _write_shards(work, draft.tensors, shard_bytes)
        if tokenizer_from is not None:
            _copy_tokenizer(Path(tokenizer_from), work)
        work.rename(target)
    return target


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One `model.safetensors`, or numbered shards with an index; one shard in memory at a time."""
    shards: list[list[str]] = []
    total = 0

    def flush(pending: dict[str, Tensor]) -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))

    pending: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > shard_bytes:
            flush(pending)
            pending, size = {}, 0
        pending[name] = tensor.detach().cpu().contiguous()
        size += nbytes
        total += nbytes
    flush(pending)
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
