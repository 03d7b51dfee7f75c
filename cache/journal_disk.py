"""A journal on disk: small entries by id in one SQLite file, the oldest first to go.

Ids sort by time (`cache.stamps`), so age and order need no column of their own. What many entries
have in common is kept once, as long as an entry may need it. Blocks; several processes may share
the file.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

from cache.errors import CacheError

log = logging.getLogger(__name__)

_PAGE_BYTES: Final = 4096
_WAL_BYTES: Final = 4 * 2**20  # SQLite's log of pages not yet in the file; part of the budget
LEAST_BUDGET: Final = 4 * _WAL_BYTES
_FULL: Final = 0.95  # of the budget; room is made beyond it
_SHARE: Final = 0.1  # of all entries, deleted at once to make room
_BUSY_SECONDS: Final = 2.0
_SAMPLE: Final = 64  # entries whose sizes stand for all
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS entries (id TEXT PRIMARY KEY, shared TEXT, data BLOB);
CREATE TABLE IF NOT EXISTS shared (digest TEXT PRIMARY KEY, last TEXT, data BLOB);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """`shared`: what this entry has in common with many others; `digest` is its name."""

    id: str
    data: bytes
    digest: str
    shared: bytes


class JournalFile:
    """Entries of one file that never takes more than `budget` bytes. Thread-safe."""

    def __init__(self, path: Path, *, budget: int) -> None:
        """
        Raises:
            CacheError: the file can neither be read nor made anew.
        """
        self._path = path
        self._pages = max(LEAST_BUDGET, budget) // _PAGE_BYTES - 2 * _WAL_BYTES // _PAGE_BYTES
        self._lock = Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = self._open_or_replace()
        except (sqlite3.Error, OSError) as error:
            raise CacheError(f"{path}: cannot be opened: {error}") from error

    def write(self, entries: Sequence[Entry], *, oldest: str) -> None:
        """Add entries, all or none; forget those with ids below `oldest`, and more when full.

        Raises:
            CacheError: they cannot be stored.
        """
        with self._lock:
            try:
                try:
                    self._write(entries, oldest)
                except sqlite3.OperationalError as error:
                    if "full" not in str(error):
                        raise
                    self._make_room()
                    self._write(entries, oldest)
                if self._used() > _FULL * self._pages:
                    self._make_room()
            except sqlite3.Error as error:
                self._mend(error)
                raise CacheError(f"{self._path}: cannot be written: {error}") from error

    def read(self, name: str) -> Entry | None:
        """
        Raises:
            CacheError: the file cannot be read.
        """
        with self._lock:
            try:
                found = self._file.execute(
                    "SELECT e.data, s.digest, s.data FROM entries e JOIN shared s "
                    "ON s.digest = e.shared WHERE e.id = ?",
                    (name,),
                ).fetchone()
            except sqlite3.Error as error:
                self._mend(error)
                raise CacheError(f"{self._path}: cannot be read: {error}") from error
        return None if found is None else Entry(name, found[0], found[1], found[2])

    def count(self) -> int:
        """How many entries there are."""
        with self._lock:
            return int(self._file.execute("SELECT count(*) FROM entries").fetchone()[0])

    def close(self) -> None:
        with self._lock, suppress(sqlite3.Error):
            self._file.close()

    def _write(self, entries: Iterable[Entry], oldest: str) -> None:
        shared: dict[str, tuple[str, str, bytes]] = {}
        for entry in entries:
            last = max(entry.id, shared.get(entry.digest, ("", ""))[1])
            shared[entry.digest] = (entry.digest, last, entry.shared)
        with self._file:  # one transaction
            self._forget(oldest)
            self._file.executemany(
                "INSERT INTO shared VALUES (?, ?, ?) ON CONFLICT (digest) "
                "DO UPDATE SET last = max(last, excluded.last)",
                shared.values(),
            )
            self._file.executemany(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?)",
                [(entry.id, entry.digest, entry.data) for entry in entries],
            )

    def _make_room(self) -> None:
        """Forget the oldest of all entries. (Counting them would read the whole file.)"""
        (size,) = self._file.execute(
            "SELECT avg(length(data)) FROM (SELECT data FROM entries ORDER BY id LIMIT ?)",
            (_SAMPLE,),
        ).fetchone()
        count = int(_SHARE * self._used() * _PAGE_BYTES / (size or _PAGE_BYTES)) + 1
        row = self._file.execute(
            "SELECT id FROM entries ORDER BY id LIMIT 1 OFFSET ?", (count,)
        ).fetchone()
        with self._file:
            self._forget(row[0] if row is not None else "~")

    def _forget(self, oldest: str) -> None:
        self._file.execute("DELETE FROM entries WHERE id < ?", (oldest,))
        self._file.execute("DELETE FROM shared WHERE last < ?", (oldest,))

    def _used(self) -> int:
        (pages,) = self._file.execute("PRAGMA page_count").fetchone()
        (free,) = self._file.execute("PRAGMA freelist_count").fetchone()
        return int(pages - free)

    def _mend(self, error: sqlite3.Error) -> None:
        """A file that is damaged is started anew; anything else (a full disk) may pass."""
        if not isinstance(error, sqlite3.OperationalError) and isinstance(
            error, sqlite3.DatabaseError
        ):
            with suppress(sqlite3.Error, OSError):
                self._file.close()
                self._file = self._open_or_replace()

    def _open_or_replace(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            log.warning("%s is damaged (%s) and is started anew", self._path, error)
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        self._path.touch(mode=0o600)
        file = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            file.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            file.execute("PRAGMA journal_mode = WAL")
            # A crash of the machine may cost the last entries, never the file.
            file.execute("PRAGMA synchronous = NORMAL")
            file.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
            file.execute(f"PRAGMA max_page_count = {self._pages}")
            file.executescript(_TABLES)
            file.execute("SELECT count(*) FROM shared").fetchone()
        except sqlite3.Error:
            file.close()
            raise
        return file
