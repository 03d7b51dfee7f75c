"""Recent use of artifacts: a count that halves every day, kept beside the manifests.

Losing it costs nothing but a poorer choice of what to evict, so it is written lazily and without
fsync, and an unreadable file counts as never used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

HALF_LIFE_SECONDS = 86_400.0
_FLUSH_SECONDS = 10.0


class Use(BaseModel):
    """A decayed use count `score` as it stood at Unix time `at`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    score: float = Field(default=0.0, ge=0.0)
    at: float = Field(default=0.0, ge=0.0)

    def now(self, moment: float) -> float:
        """The count decayed to `moment`."""
        return float(self.score * 0.5 ** (max(0.0, moment - self.at) / HALF_LIFE_SECONDS))

    def bumped(self, moment: float, by: float = 1.0) -> Use:
        """One more use at `moment`."""
        return Use(score=self.now(moment) + by, at=max(moment, self.at))


def parse_use(data: bytes | None) -> Use:
    """A stored `Use`; never used when there is none or it cannot be read."""
    try:
        return Use.model_validate_json(data) if data else Use()
    except ValidationError:
        return Use()


class UseLog:
    """Use counts in one folder, one small file per key, shared by the processes of a host."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._pending: dict[str, tuple[float, float]] = {}  # key → (uses, first unwritten at)
        self._lock = threading.Lock()

    def touch(self, key: str, *, flush: bool = False) -> None:
        """Count one use. Written at once for a first use or `flush`, else every few seconds."""
        now = self._clock()
        with self._lock:
            uses, since = self._pending.get(key, (0.0, now))
            self._pending[key] = (uses + 1.0, since)
            if flush or now - since >= _FLUSH_SECONDS:
                self._write(key)

    def read(self, key: str) -> Use:
        """What is known of `key`, unwritten uses included."""
        with self._lock:
            return self._current(key)

    def forget(self, key: str) -> None:
        with self._lock:
            self._pending.pop(key, None)
            self._file(key).unlink(missing_ok=True)

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop the files of everything else."""
        known = frozenset(keys)
        for path in self._folder.glob("*"):
            if path.name not in known:
                path.unlink(missing_ok=True)

    def _current(self, key: str) -> Use:
        try:
            stored = parse_use(self._file(key).read_bytes())
        except FileNotFoundError:
            stored = Use()
        uses, _ = self._pending.get(key, (0.0, 0.0))
        return stored.bumped(self._clock(), uses) if uses else stored

    def _write(self, key: str) -> None:
        current = self._current(key)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{key}.{threading.get_ident()}"
        temporary.write_bytes(orjson.dumps(current.model_dump()))
        temporary.replace(self._file(key))
        del self._pending[key]

    def _file(self, key: str) -> Path:
        return self._folder / key
