"""An unfinished training on disk: safetensors and a JSON note, written whole or not at all.

The note names the job it belongs to and the digest of the tensors; both are checked on load, and
what does not fit is ignored, since training can always begin again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_NOTE = "training.json"
_FORMAT = 1


class TrainingState:
    """Keeps the newest state of one job in `folder`.

    Args:
        folder: made when the first state is kept; holds nothing else.
        job: says which job this is; a state of any other is not taken.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder, job

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state before `step`; the one kept before is dropped once this one is safe."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"step-{step}.safetensors"
        temporary = file.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        digest = _digest(temporary)
        _sync(temporary)
        temporary.replace(file)
        note = {"format": _FORMAT, "job": self._job, "step": step, "digest": digest}
        pending = self._folder / f"{_NOTE}.tmp"
        pending.write_text(json.dumps(note), encoding="utf-8")
        _sync(pending)
        pending.replace(self._folder / _NOTE)
        for other in self._folder.glob("step-*"):
            if other != file:
                other.unlink()

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(step, tensors) as saved, or None where there is nothing that can be trusted."""
        try:
            note = json.loads((self._folder / _NOTE).read_text(encoding="utf-8"))
            step = note["step"]
            if (note["format"], note["job"]) != (_FORMAT, self._job) or not isinstance(step, int):
                return None
            file = self._folder / f"step-{step}.safetensors"
            if _digest(file) != note["digest"]:
                return None
            return step, load_file(file)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def clear(self) -> None:
        """Forget the job: it is done."""
        if not self._folder.is_dir():
            return
        for file in (*self._folder.glob("step-*"), *self._folder.glob(f"{_NOTE}*")):
            file.unlink()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


def _digest(file: Path) -> str:
    return blake3().update_mmap(file).hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
