"""Small records kept in files by name: results of slow readings that any process may use again.

A record that is lost, damaged or of another form costs the time to make it anew, and nothing else.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from cache.files import write_atomic

log = logging.getLogger(__name__)
T = TypeVar("T", bound=BaseModel)

_LARGEST = 4 << 20  # bytes of a record
_MOST = 512  # records of a folder


class Kept(Generic[T]):
    """Records of one kind in `folder`, as JSON. Names are digests: plain file names."""

    def __init__(self, folder: Path, kind: type[T]) -> None:
        self._folder, self._kind = folder, kind

    def get(self, name: str) -> T | None:
        """The record; None where there is none, or none that `put` wrote."""
        file = self._file(name)
        try:
            if file.stat().st_size > _LARGEST:
                return None
            return self._kind.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, name: str, record: T) -> None:
        """Keep the record, if the disk will; the oldest go where there are too many."""
        text = record.model_dump_json().encode()
        if len(text) > _LARGEST:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(name), text)
            files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in files[:-_MOST]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is not kept: %s", name, error)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"
