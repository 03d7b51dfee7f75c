"""The disk tier: content-addressed blobs and the manifests that name them, under one folder.

    manifests/<key>.json   blobs/ab/<digest>   staging/<writer>/   quarantine/   uses/   lock

Many processes may share a folder. Everything that removes or publishes holds `lock` (an advisory
lock of the host) for that short step; readers hold a shared lock on their manifest, a lease that
evictions respect. Nothing is served before its digest was proven. All calls block.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cache.artifact import Artifact
from cache.blobs import BadBlob, Blobs, Stamp, stamp_of
from cache.errors import CacheFull, CorruptArtifact
from cache.eviction import Candidate, choose_victims
from cache.files import clear_errors, exclusive, try_lock
from cache.keys import check_key
from cache.manifest import Manifest
from cache.uses import UseLog
from cache.writer import LOCK_NAME, ArtifactWriter

QUARANTINE_SECONDS = 86_400.0


class Event(StrEnum):
    """What a store reports to its owner, with the key or digest it is about."""

    HIT = "hit"
    MISS = "miss"
    EVICTION = "eviction"
    CORRUPTION = "corruption"


EventFn = Callable[[Event, str], None]


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes on disk now: `blob_bytes` published, `other_bytes` staged or quarantined."""

    artifacts: int
    blobs: int
    blob_bytes: int
    other_bytes: int
    budget: int

    @property
    def total_bytes(self) -> int:
        return self.blob_bytes + self.other_bytes


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` read and what it took out of service (`key: why`)."""

    artifacts: int
    blobs: int
    checked_bytes: int
    corrupt: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` removed."""

    blobs: int
    staging: int
    quarantined: int
    freed_bytes: int


class DiskStore:
    """Artifacts on disk under a byte budget. Thread- and process-safe.

    Args:
        budget: bytes the folder may hold. While several writers work at once it may be exceeded by
            what they have staged; every commit brings it back.
        on_event: told of hits, misses, evictions and corruptions, from the calling thread.
    """

    def __init__(
        self, root: Path, budget: int, *, on_event: EventFn = lambda _event, _what: None
    ) -> None:
        self.root = root
        self.budget = budget
        self.staging = root / "staging"
        self._manifests = root / "manifests"
        self._quarantine = root / "quarantine"
        self.blobs = Blobs(root / "blobs")
        self._uses = UseLog(root / "uses")
        self._on_event = on_event
        self._parsed: dict[str, tuple[Stamp, Manifest]] = {}
        with clear_errors(f"cannot use {root} as a cache"):
            for folder in (self.staging, self._manifests, self._quarantine, self.blobs.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def locked(self) -> AbstractContextManager[None]:
        """The host-wide lock; hold it briefly and never call another method of the store inside."""
        return exclusive(self.root / "lock")

    def manifest_path(self, key: str) -> Path:
        return self._manifests / f"{check_key(key)}.json"

    def writer(self, key: str, *, resume: bool = False) -> ArtifactWriter:
        """Start an artifact, or go on with one whose writer was killed if `resume`.

        Raises `CacheError` for a bad key or an unusable folder.
        """
        return ArtifactWriter(self, check_key(key), resume=resume)

    def published(self, key: str) -> None:
        """A writer has published `key`: count its first use and come back under the budget."""
        self.touch(key)
        with suppress(CacheFull):
            self.make_room(0, keep={key})

    def read(self, key: str) -> Artifact | None:
        """Open an artifact, proven. None when absent or damaged; damage is put in quarantine."""
        lease = self._lease(key)
        if lease is None:
            self._on_event(Event.MISS, key)
            return None
        stamp = stamp_of(os.fstat(lease))
        try:
            manifest = self._parse(key, stamp)
            self.blobs.prefetch(manifest.blobs)
            blobs = {
                digest: self.blobs.open(digest, size) for digest, size in manifest.blobs.items()
            }
        except BaseException as error:
            deleted = os.fstat(lease).st_nlink == 0
            os.close(lease)
            if not isinstance(error, CorruptArtifact):
                raise
            if not deleted:
                self._isolate(key, stamp, error)
            self._on_event(Event.MISS, key)
            return None
        self._on_event(Event.HIT, key)
        return Artifact(manifest, blobs, lease)

    def keys(self) -> list[str]:
        """Keys of all published artifacts, sorted; damaged ones may be among them."""
        return sorted(path.stem for path in self._manifests.glob("[0-9a-f]*.json"))

    def manifest(self, key: str) -> Manifest | None:
        """The manifest alone; says nothing about the blobs. None when absent or unreadable."""
        try:
            stamp = stamp_of(self.manifest_path(key).stat())
            return self._parse(key, stamp)
        except FileNotFoundError:
            return None
        except CorruptArtifact as error:
            self._isolate(key, stamp, error)
            return None

    def touch(self, key: str) -> None:
        """Count one use of `key`, for the evictor. A full disk does not matter here."""
        with suppress(OSError):
            self._uses.touch(check_key(key))

    def delete(self, key: str) -> bool:
        """Remove an artifact and the blobs only it has, leased or not. False when absent."""
        with clear_errors(f"cannot delete artifact {key}"), self.locked():
            if not self.manifest_path(key).is_file():
                return False
            self._remove([key])
            return True

    def verify(self) -> VerifyReport:
        """Hash every blob of every artifact again; quarantine what is damaged."""
        proven: dict[str, int] = {}
        corrupt: list[str] = []
        keys = self.keys()
        for key in keys:
            try:
                stamp = stamp_of(self.manifest_path(key).stat())
                manifest = self._parse(key, stamp)
                for digest, size in manifest.blobs.items():
                    if digest not in proven:
                        self.blobs.open(digest, size, trust=False)
                        proven[digest] = size
            except FileNotFoundError:
                continue  # deleted meanwhile
            except CorruptArtifact as error:
                self._isolate(key, stamp, error)
                corrupt.append(f"{key}: {error}")
        return VerifyReport(len(keys), len(proven), sum(proven.values()), tuple(corrupt))

    def gc(self, *, quarantine_seconds: float = QUARANTINE_SECONDS) -> GcReport:
        """Remove blobs no manifest names, staging of dead writers, and old quarantine.

        Live writers are safe without a grace period: their blobs are in staging folders they hold
        locked, and move to their places in one locked step together with their manifest.
        """
        with clear_errors("cannot clean the cache"), self.locked():
            before = self._scan().total_bytes
            blobs = self._remove_orphans()
            staging = self._remove_dead_staging()
            quarantined = self._empty_quarantine(time.time() - quarantine_seconds)
            for debris in self._manifests.glob(".*.tmp"):  # written under this very lock
                debris.unlink(missing_ok=True)
            self._uses.keep_only(self.keys())
            freed = before - self._scan().total_bytes
        return GcReport(blobs, staging, quarantined, freed)

    def usage(self) -> DiskUsage:
        """What lies on disk now."""
        with clear_errors("cannot read the cache"):
            return self._scan()

    def make_room(self, need: int, *, keep: Collection[str] = ()) -> int:
        """Have at least `need` bytes free in the budget and on the file system; evict for it.

        Debris goes first, then artifacts in the order of `cache.eviction`, never a leased one or
        one of `keep`.

        Returns:
            the bytes now free.

        Raises:
            CacheFull: not even with everything evictable gone.
        """
        with clear_errors(f"cannot make room for {need} bytes"), self.locked():
            free = self._free()
            if free < need:
                self._remove_orphans()
                self._remove_dead_staging()
                self._empty_quarantine(time.time())
                free = self._free()
            if free < need:
                self._remove(choose_victims(self._candidates(keep), need - free), evicted=True)
                free = self._free()
        if free < need:
            raise CacheFull(
                f"the cache at {self.root} has no room for {need} bytes: {max(free, 0)} of its "
                f"{self.budget} are free and everything else is in use"
            )
        return free

    def _free(self) -> int:
        used = self._scan().total_bytes
        return min(self.budget - used, shutil.disk_usage(self.root).free)

    def _lease(self, key: str) -> int | None:
        """A shared lock on a manifest that is still in its place; None when there is none."""
        with clear_errors(f"cannot read artifact {key}"):
            try:
                lease = os.open(self.manifest_path(key), os.O_RDONLY)
            except FileNotFoundError:
                return None
        fcntl.flock(lease, fcntl.LOCK_SH)  # waits at most for an evictor's glance
        if os.fstat(lease).st_nlink == 0:
            os.close(lease)
            return None
        return lease

    def _parse(self, key: str, stamp: Stamp) -> Manifest:
        known = self._parsed.get(key)
        if known is not None and known[0] == stamp:
            return known[1]
        manifest = Manifest.from_json(self.manifest_path(key).read_bytes())
        if manifest.key != key:
            raise CorruptArtifact(f"the manifest of {key} is that of {manifest.key}")
        self._parsed[key] = (stamp, manifest)
        return manifest

    def _isolate(self, key: str, stamp: Stamp, error: CorruptArtifact) -> None:
        """Move what is damaged out of service, unless something new has replaced it meanwhile."""
        broken = [(self.manifest_path(key), stamp)]
        if isinstance(error, BadBlob) and error.stamp is not None:
            broken.append((self.blobs.path(error.digest), error.stamp))
        with clear_errors(f"cannot quarantine artifact {key}"), self.locked():
            for path, seen in broken:
                with suppress(FileNotFoundError):
                    if stamp_of(path.stat()) == seen:
                        path.replace(self._quarantine / f"{path.name}.{time.time_ns()}")
        self._parsed.pop(key, None)
        self._on_event(Event.CORRUPTION, key)

    def _candidates(self, keep: Collection[str]) -> list[Candidate]:
        found = []
        now = time.time()
        for key in self.keys():
            try:
                manifest = self._parse(key, stamp_of(self.manifest_path(key).stat()))
            except (CorruptArtifact, FileNotFoundError):
                continue
            use = self._uses.read(key)
            found.append(
                Candidate(
                    key=key,
                    blobs=manifest.blobs,
                    rebuild_seconds=manifest.build_seconds,
                    uses=use.now(now),
                    last_used=use.at,
                    pinned=key in keep or self._leased(key),
                )
            )
        return found

    def _leased(self, key: str) -> bool:
        lock = try_lock(self.manifest_path(key), fcntl.LOCK_EX)
        if lock is not None:
            os.close(lock)
        return lock is None

    def _remove(self, keys: Collection[str], *, evicted: bool = False) -> None:
        """Unlink manifests, then the blobs that no manifest names any more. Under the lock."""
        for key in keys:
            self.manifest_path(key).unlink(missing_ok=True)
            self._parsed.pop(key, None)
            self._uses.forget(key)
            if evicted:
                self._on_event(Event.EVICTION, key)
        if keys:
            self._remove_orphans()

    def _remove_orphans(self) -> int:
        named: set[str] = set()
        for key in self.keys():
            with suppress(CorruptArtifact, FileNotFoundError):
                named |= self._parse(key, stamp_of(self.manifest_path(key).stat())).blobs.keys()
        orphans = [digest for digest in self.blobs.listing() if digest not in named]
        for digest in orphans:
            self.blobs.path(digest).unlink(missing_ok=True)
            self.blobs.forget(digest)
        return len(orphans)

    def _remove_dead_staging(self) -> int:
        removed = 0
        for folder in self.staging.iterdir():
            lock = try_lock(folder / LOCK_NAME, fcntl.LOCK_EX)
            if lock is None and (folder / LOCK_NAME).exists():
                continue  # its writer is alive
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
            if lock is not None:
                os.close(lock)
        return removed

    def _empty_quarantine(self, older_than: float) -> int:
        old = [path for path in self._quarantine.iterdir() if path.stat().st_ctime <= older_than]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _scan(self) -> DiskUsage:
        sizes = self.blobs.listing().values()
        other = 0
        for top in (self.staging, self._quarantine):
            for folder, _, names in os.walk(top):
                for name in names:
                    with suppress(FileNotFoundError):
                        status = (Path(folder) / name).stat()
                        if status.st_nlink == 1:  # more links: a published blob, held
                            other += status.st_size
        return DiskUsage(len(self.keys()), len(sizes), sum(sizes), other, self.budget)
