"""Keeps what was decided, for whoever asks later: the last decisions in memory, a day of them in
the journal, and a line for each in the decision log, if there is one.

A request pays for one entry in a table. Everything else is done by one task in the background, a
record at a time, so that nobody waits for more than one; what does not fit is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

from blake3 import blake3

from cache.journal import Journal
from cache.journal_disk import Entry
from cache.stamps import new_stamp, stamped_at
from cache.threads import in_thread
from gateway.api.decision_log import DecisionLog, Refused, line
from gateway.policy.record import NOBODY, Codec, Floors, Record, render

log = logging.getLogger(__name__)

PREFIX: Final = "dec"
DAY_SECONDS: Final = 86_400.0
MAX_RECENT: Final = 1024  # decisions in memory, and the bytes they may take
MAX_RECENT_BYTES: Final = 16 * 2**20
MAX_PENDING: Final = 4096  # finished and not yet written
_UNWRITTEN_BYTES: Final = 8192  # of a record as objects, about
_FLUSH_SECONDS: Final = 0.5
_BATCH: Final = 64  # records to one write

Lost = Callable[[str, int], None]
"""Told what could not be kept: where (`memory`, `disk`, `redis`, `log`) and how many."""


def _ignore(_where: str, _count: int) -> None:
    """Nobody counts."""


class Ledger:
    """Decisions by id. For one event loop.

    Args:
        journal: where they are kept for the day; None: in memory only.
        decision_log: a line of JSON per finished request.
        ttl: seconds that a decision can be asked for.
        floors: the tightest times that each API key may ask for, by bound.
        clock: Unix seconds.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        decision_log: DecisionLog | None = None,
        *,
        ttl: float = DAY_SECONDS,
        floors: Floors = NOBODY,
        on_lost: Lost = _ignore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._log = decision_log
        self._ttl = ttl
        self._floors = floors
        self._on_lost = on_lost
        self._clock = clock
        self._codec = Codec()
        self._recent: OrderedDict[str, Record | Entry] = OrderedDict()
        self._recent_bytes = 0
        self._pending: list[Record | Refused] = []
        self._writing: asyncio.Task[None] | None = None

    @property
    def with_text(self) -> bool:
        """Are prompts and answers to be logged?"""
        return self._log is not None and self._log.with_text

    def new_id(self) -> str:
        return new_stamp(PREFIX, self._clock())

    def opened(self, record: Record) -> None:
        """A decision has been taken; a second one for the same request replaces the first."""
        self._remember(record.id, record)

    def closed(self, record: Record | Refused) -> None:
        """The request has ended: `record.result` says how. What was refused before a decision is
        only logged."""
        if self._log is None and (self._journal is None or isinstance(record, Refused)):
            return
        if len(self._pending) >= MAX_PENDING:
            self._on_lost("memory", 1)
            return
        self._pending.append(record)

    async def read(self, name: str, key: str | None = None) -> dict[str, Any] | None:
        """A decision explained; None when it is unknown, too old, or (with `key`) not of that API
        key."""
        at = stamped_at(PREFIX, name)
        if at is None or at < self._clock() - self._ttl:
            return None
        known = self._recent.get(name)
        if isinstance(known, Record):
            if key is not None and known.key != key:
                return None
            known = self._entry(known)
        if known is None and self._journal is not None:
            known = await self._journal.read(name)
        if known is None:
            return None
        told = await asyncio.to_thread(render, known.data, known.shared, self._floors)
        return None if key is not None and told["key"] != key else told

    async def run(self) -> None:
        """Write what has ended, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            if self._pending:
                self._writing = asyncio.create_task(self.flush())
                await asyncio.shield(self._writing)

    async def flush(self) -> None:
        """Write everything that has ended so far."""
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), _BATCH):
            try:
                await self._write(pending[start : start + _BATCH])
            except Exception:  # a record that cannot be written must not cost the others
                log.exception("decisions were not written")

    async def close(self) -> None:
        """Write the rest and close the files. `run` must have been cancelled."""
        if self._writing is not None:
            await self._writing
        await self.flush()
        if self._journal is not None:
            await self._journal.close()
        if self._log is not None:
            await in_thread(self._log.close)

    async def _write(self, records: Sequence[Record | Refused]) -> None:
        if self._log is not None:
            lines = [line(record) for record in records]
            if not await in_thread(self._log.write, lines):
                self._on_lost("log", len(lines))
        if self._journal is None:
            return
        entries = []
        for record in records:
            if isinstance(record, Refused):
                continue
            entries.append(self._entry(record))
            if record.id in self._recent:
                self._remember(record.id, entries[-1])
            await asyncio.sleep(0)
        for where, lost in zip(("disk", "redis"), await self._journal.write(entries), strict=True):
            if lost:
                self._on_lost(where, lost)

    def _entry(self, record: Record) -> Entry:
        data, shared = self._codec.encode(record)
        return Entry(record.id, data, blake3(shared).hexdigest(), shared)

    def _remember(self, name: str, what: Record | Entry) -> None:
        self._forget(name)
        self._recent[name] = what
        self._recent_bytes += _size(what)
        while len(self._recent) > MAX_RECENT or self._recent_bytes > MAX_RECENT_BYTES:
            self._forget(next(iter(self._recent)))

    def _forget(self, name: str) -> None:
        if (known := self._recent.pop(name, None)) is not None:
            self._recent_bytes -= _size(known)


def _size(what: Record | Entry) -> int:
    return _UNWRITTEN_BYTES if isinstance(what, Record) else len(what.data)
