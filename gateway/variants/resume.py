"""How far a build came, kept beside the blobs it has staged: a killed worker's successor goes on.

The notes are one safetensors file in the writer's folder, named after its own digest: a torn or
altered one is never used, nor one of other library versions or another calibration text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cache.manifest import ModuleRecord, TensorRecord
from cache.writer import ArtifactWriter
from compressors.base import Milestone
from gateway.variants.artifact import ArtifactSink

_PREFIX = "notes-"
_EVERY_S = 5.0


class BuildJournal:
    """A `compressors.base.Journal` of one artifact.

    Args:
        same: facts that a later run must share to go on, e.g. library versions.
        every: seconds between two notes; writing hidden states costs time.
    """

    def __init__(
        self,
        writer: ArtifactWriter,
        sink: ArtifactSink,
        same: Mapping[str, Any],
        *,
        every: float = _EVERY_S,
    ) -> None:
        self._writer, self._sink, self._every = writer, sink, every
        self._same = dict(same)
        self._last = time.monotonic()

    def load(self) -> Milestone | None:
        for path in self._writer.folder.glob(f"{_PREFIX}*"):
            milestone = self._read(path) if self._writer.resumed else None
            if milestone is not None:
                return milestone
            path.unlink(missing_ok=True)
        return None

    def _read(self, path: Path) -> Milestone | None:
        if blake3().update_mmap(path).hexdigest() != path.name.removeprefix(_PREFIX):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                notes = orjson.loads(file.metadata()["notes"])
                hidden = tuple(file.get_tensor(str(i)).clone() for i in range(notes["batches"]))
        except (SafetensorError, orjson.JSONDecodeError, KeyError, TypeError):
            return None
        tensors = {n: TensorRecord.model_validate(r) for n, r in notes["tensors"].items()}
        if notes["same"] != self._same or not all(
            self._writer.has(record.digest) for record in tensors.values()
        ):
            return None
        self._sink.tensors.update(tensors)
        self._sink.modules.update(
            {name: ModuleRecord.model_validate(r) for name, r in notes["modules"].items()}
        )
        return Milestone(notes["blocks"], notes["facts"], hidden)

    def save(self, milestone: Milestone) -> None:
        if time.monotonic() - self._last < self._every:
            return
        tensors, modules = self._sink.records()
        notes = {
            "same": self._same,
            "blocks": milestone.blocks,
            "facts": milestone.facts,
            "batches": len(milestone.hidden),
            "tensors": {name: record.model_dump() for name, record in tensors.items()},
            "modules": {name: record.model_dump() for name, record in modules.items()},
        }
        hidden = {str(i): t.contiguous().cpu() for i, t in enumerate(milestone.hidden)}
        new = self._writer.folder / "notes.part"
        save_file(hidden, new, {"notes": orjson.dumps(notes).decode()})
        old = list(self._writer.folder.glob(f"{_PREFIX}*"))
        new.rename(new.with_name(_PREFIX + blake3().update_mmap(new).hexdigest()))
        for path in old:
            path.unlink()
        self._last = time.monotonic()
