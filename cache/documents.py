"""Small named JSON documents that all replicas share: policies, cards, job progress, counters.

Every document has a version that only grows. The copy on disk is written atomically and is enough
by itself; with Redis the newer of both counts (Redis on a tie), replicas hear of changes through
pub/sub, and whatever either side missed is evened out when the subscription (re)starts.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache.errors import CacheError
from cache.files import clear_errors, exclusive, write_atomic
from cache.keys import check_name, check_namespace, file_name, name_of
from cache.link import RedisAway
from cache.redis import RedisStore
from cache.threads import in_thread

log = logging.getLogger(__name__)

Doc = dict[str, Any]
ChangeFn = Callable[[Doc | None], Doc | None]
"""A document's new content from its newest one (None: it is not there, or shall not be)."""
WatchFn = Callable[[str, Doc | None], Awaitable[None] | None]
"""Called with a document's name and its new content, or None when it was deleted."""

MAX_BYTES = 2**20
CHANNEL = "documents"
_FORGET_SECONDS = 7 * 86_400  # deletions older than this need no trace: every replica knows
_SUFFIX = ".json"
_TRIES = 100  # of an update whose document others keep writing

# A value in the hash is `<version> <JSON of entry>`. Mode `next` numbers it after all that is
# known, `exact` stores it only if it is newer; returns the version now there and 1 if stored.
_STORE = """
local there = redis.call('HGET', KEYS[1], ARGV[1])
local last = there and tonumber(string.match(there, '^%d+')) or 0
local version = tonumber(ARGV[3])
if ARGV[4] == 'next' then
  if last > version then version = last end
  version = version + 1
elseif ARGV[4] == 'after' then
  if last ~= tonumber(ARGV[7]) then return {last, 0} end
elseif last >= version then
  return {last, 0}
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', version) .. ' ' .. ARGV[2])
redis.call('PUBLISH', ARGV[5], ARGV[6])
return {version, 1}
"""


class _Entry(BaseModel):
    """One version of one document; `doc` None when it was deleted. `at`: Unix seconds."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(default=0, ge=0)
    at: float = 0.0
    doc: Doc | None = None


_NOTHING = _Entry()


class Documents:
    """Documents under `<root>/documents` and in Redis. For one event loop."""

    def __init__(self, root: Path, redis: RedisStore | None = None) -> None:
        self._folder = root / "documents"
        self._redis = redis
        self._watchers: defaultdict[str, list[WatchFn]] = defaultdict(list)
        self._seen: dict[tuple[str, str], int] = {}
        self._listening: Callable[[], None] | None = None

    async def get(self, namespace: str, name: str) -> Doc | None:
        """The newest version known, or None."""
        self._listen()
        entry = await in_thread(self._read, check_namespace(namespace), check_name(name))
        newer = await self._remote(namespace, name)
        return max(newer, entry, key=_version).doc

    async def put(self, namespace: str, name: str, doc: Doc) -> None:
        """Store a new version and tell every replica's watchers.

        Raises:
            CacheError: a bad name, a document over 1 MiB or not JSON, or a disk that cannot be
                written.
        """
        _check_size(namespace, name, doc)
        await self._store(namespace, name, doc)

    async def update(self, namespace: str, name: str, change: ChangeFn) -> Doc | None:
        """Store what `change` makes of the newest version, which nobody overwrites meanwhile.

        `change` is pure; it is called again when another writer was first, and perhaps from another
        thread. What it raises ends the update, and nothing has changed.

        Raises:
            CacheError: as `put`; or others keep writing the document.
        """
        self._listen()
        check_namespace(namespace), check_name(name)
        for _ in range(_TRIES):
            entry = await self._try_update(namespace, name, change)
            if entry is not None:
                await self._changed(namespace, name, entry)
                return entry.doc
            await asyncio.sleep(random.uniform(0, 0.01))  # noqa: S311 - spreads the next tries
        raise CacheError(f"document {namespace}/{name} is being written by too many at once")

    async def delete(self, namespace: str, name: str) -> bool:
        """Delete it everywhere. False when there was none."""
        if await self.get(namespace, name) is None:
            return False
        await self._store(namespace, name, None)
        return True

    async def all(self, namespace: str) -> dict[str, Doc]:
        """Every document of a namespace by name, sorted."""
        self._listen()
        entries = await in_thread(self._read_all, check_namespace(namespace))
        for name, entry in (await self._remote_all(namespace)).items():
            entries[name] = max(entry, entries.get(name, _NOTHING), key=_version)
        return {name: e.doc for name, e in sorted(entries.items()) if e.doc is not None}

    async def watch(self, namespace: str, callback: WatchFn) -> Callable[[], None]:
        """Call `callback` for every later change, made here or on any replica.

        Returns what ends the watch. Changes that happened while Redis was away are reported once
        each when it is back.
        """
        entries = await in_thread(self._read_all, check_namespace(namespace))
        for name, entry in [*entries.items(), *(await self._remote_all(namespace)).items()]:
            seen = self._seen.get((namespace, name), 0)
            self._seen[namespace, name] = max(seen, entry.version)
        self._watchers[namespace].append(callback)
        self._listen()

        def stop() -> None:
            with suppress(ValueError):
                self._watchers[namespace].remove(callback)

        return stop

    async def close(self) -> None:
        """Stop listening. Does not close Redis."""
        if self._listening is not None:
            self._listening()
        self._watchers.clear()

    async def _store(self, namespace: str, name: str, doc: Doc | None) -> None:
        self._listen()
        local = await in_thread(self._read, check_namespace(namespace), check_name(name))
        entry = _Entry(version=local.version, at=time.time(), doc=doc)
        try:
            version, _ = await self._push(namespace, name, entry, "next")
            entry = entry.model_copy(update={"version": version})
            await in_thread(self._write, namespace, name, entry)
        except RedisAway:
            entry = await in_thread(self._write_next, namespace, name, entry)
        await self._changed(namespace, name, entry)

    async def _try_update(self, namespace: str, name: str, change: ChangeFn) -> _Entry | None:
        """The version stored; None when another writer was first."""
        try:
            there = await self._fetch(namespace, name)
            newest = max(there, await in_thread(self._read, namespace, name), key=_version)
            entry = _next(namespace, name, newest, change)
            answer = await self._push(namespace, name, entry, "after", there.version)
        except RedisAway:
            return await in_thread(self._write_changed, namespace, name, change)
        if not answer[1]:
            return None
        await in_thread(self._write, namespace, name, entry)
        return entry

    async def _push(
        self, namespace: str, name: str, entry: _Entry, mode: str, after: int = 0
    ) -> list[int]:
        if self._redis is None:
            raise RedisAway("none configured")
        value = orjson.dumps({"at": entry.at, "doc": entry.doc})
        answer: list[int] = await self._redis.link.command(
            "EVAL", _STORE, 1, self._hash(namespace), name, value, entry.version, mode,
            self._redis.bus.channel(CHANNEL), f"{namespace} {name}", after,
        )  # fmt: skip
        return answer

    async def _fetch(self, namespace: str, name: str) -> _Entry:
        if self._redis is None:
            raise RedisAway("none configured")
        return _parse(await self._redis.link.command("HGET", self._hash(namespace), name))

    async def _remote(self, namespace: str, name: str) -> _Entry:
        with suppress(RedisAway):
            return await self._fetch(namespace, name)
        return _NOTHING

    async def _remote_all(self, namespace: str) -> dict[str, _Entry]:
        if self._redis is None:
            return {}
        try:
            values = await self._redis.link.command("HGETALL", self._hash(namespace))
        except RedisAway:
            return {}
        return {name.decode(): _parse(value) for name, value in values.items()}

    def _listen(self) -> None:
        if self._listening is None and self._redis is not None:
            self._listening = self._redis.bus.listen(CHANNEL, self._heard)

    async def _heard(self, message: bytes | None) -> None:
        """A change somewhere, or (None) perhaps many."""
        if message is None:
            folders = await in_thread(lambda: sorted(p.name for p in self._folder.glob("*/")))
            for namespace in {*folders, *self._watchers}:
                await self._even_out(namespace)
            return
        namespace, _, name = message.decode().partition(" ")
        check_namespace(namespace), check_name(name)
        entry = await self._remote(namespace, name)
        if entry.version > self._seen.get((namespace, name), 0):
            await in_thread(self._write, namespace, name, entry)
            await self._changed(namespace, name, entry)

    async def _even_out(self, namespace: str) -> None:
        """Bring disk and Redis to the newest version of everything in a namespace."""
        local = await in_thread(self._read_all, namespace)
        remote = await self._remote_all(namespace)
        for name in sorted(local.keys() | remote.keys()):
            here, there = local.get(name, _NOTHING), remote.get(name, _NOTHING)
            newest = max(there, here, key=_version)
            if newest.doc is None and newest.at < time.time() - _FORGET_SECONDS:
                await self._forget(namespace, name)
            elif here.version > there.version:
                with suppress(RedisAway):
                    await self._push(namespace, name, here, "exact")
            elif here != there:
                if here.version == there.version:  # both sides wrote while apart: Redis wins
                    self._seen[namespace, name] = there.version - 1
                await in_thread(self._write, namespace, name, there)
            await self._changed(namespace, name, newest)

    async def _forget(self, namespace: str, name: str) -> None:
        assert self._redis is not None
        await in_thread(self._path(namespace, name).unlink, missing_ok=True)
        with suppress(RedisAway):
            await self._redis.link.command("HDEL", self._hash(namespace), name)

    async def _changed(self, namespace: str, name: str, entry: _Entry) -> None:
        """Tell the watchers, once per version."""
        if entry.version <= self._seen.get((namespace, name), 0):
            return
        self._seen[namespace, name] = entry.version
        for callback in list(self._watchers[namespace]):
            try:
                answer = callback(name, entry.doc)
                if inspect.isawaitable(answer):
                    await answer
            except Exception:
                log.exception("a watcher of %s failed on %s", namespace, name)

    def _hash(self, namespace: str) -> str:
        assert self._redis is not None
        return f"{self._redis.prefix}documents:{namespace}"

    def _path(self, namespace: str, name: str) -> Path:
        return self._folder / namespace / (file_name(name) + _SUFFIX)

    def _read(self, namespace: str, name: str) -> _Entry:
        path = self._path(namespace, name)
        try:
            return _Entry.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _NOTHING
        except ValidationError:
            log.warning("document %s cannot be read and counts as absent", path)
            return _NOTHING

    def _read_all(self, namespace: str) -> dict[str, _Entry]:
        names = [name_of(p.name.removesuffix(_SUFFIX)) for p in self._files(namespace)]
        return {name: self._read(namespace, name) for name in names}

    def _files(self, namespace: str) -> list[Path]:
        return [p for p in (self._folder / namespace).glob("*" + _SUFFIX) if p.name[0] != "."]

    def _write(self, namespace: str, name: str, entry: _Entry) -> None:
        """Store a version unless the disk has a newer one."""
        with self._locked(namespace):
            if self._read(namespace, name).version <= entry.version:
                write_atomic(self._path(namespace, name), entry.model_dump_json().encode())

    def _write_next(self, namespace: str, name: str, entry: _Entry) -> _Entry:
        """Store a new version after the one on disk."""
        with self._locked(namespace):
            version = self._read(namespace, name).version + 1
            entry = entry.model_copy(update={"version": version})
            write_atomic(self._path(namespace, name), entry.model_dump_json().encode())
        return entry

    def _write_changed(self, namespace: str, name: str, change: ChangeFn) -> _Entry:
        """Store what `change` makes of the version on disk."""
        with self._locked(namespace):
            entry = _next(namespace, name, self._read(namespace, name), change)
            write_atomic(self._path(namespace, name), entry.model_dump_json().encode())
        return entry

    @contextmanager
    def _locked(self, namespace: str) -> Iterator[None]:
        folder = self._folder / namespace
        with clear_errors(f"cannot write documents of {namespace}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with exclusive(folder / ".lock"):
                yield


def _next(namespace: str, name: str, last: _Entry, change: ChangeFn) -> _Entry:
    doc = change(last.doc)
    if doc is not None:
        _check_size(namespace, name, doc)
    return _Entry(version=last.version + 1, at=time.time(), doc=doc)


def _check_size(namespace: str, name: str, doc: Doc) -> None:
    """
    Raises:
        CacheError: not JSON, or over 1 MiB.
    """
    try:
        size = len(orjson.dumps(doc))
    except TypeError as error:
        raise CacheError(f"document {namespace}/{name} is not JSON: {error}") from None
    if size > MAX_BYTES:
        raise CacheError(f"document {namespace}/{name} has {size} bytes; {MAX_BYTES} may be")


def _parse(value: bytes | None) -> _Entry:
    """A value of the Redis hash; absent when it cannot be read."""
    if value is None:
        return _NOTHING
    version, _, rest = value.partition(b" ")
    try:
        return _Entry.model_validate({**orjson.loads(rest), "version": int(version)})
    except (ValueError, TypeError):
        log.warning("a document in Redis cannot be read and counts as absent")
        return _NOTHING


def _version(entry: _Entry) -> int:
    return entry.version
