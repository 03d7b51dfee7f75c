"""Checkpoints on disk: a folder of `config.json` and safetensors, read safely and checked whole.

Owns finding or downloading the folder and its tensors by memory map; never pickle, never a
repository's own code. Which module a tensor belongs to is `model`'s. huggingface_hub is imported
here and only when used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressors.base import CompressionError
from compressors.pages import drop_pages
from compressors.tensor import LinearForm

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# One expert of a fused parameter, some of its rows: `name[3][0:56]`, `name[3].T[0:56]`.
_PART = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\](?P<turn>\.T)?\[(?P<from>\d+):(?P<to>\d+)\]")


class CheckpointError(CompressionError, ValueError):
    """The checkpoint cannot be read or is of a kind that is not supported; the message says why."""


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
