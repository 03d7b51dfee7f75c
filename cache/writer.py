"""Making one artifact: blobs go to a private staging folder and appear all at once, or never.

The staging folder is locked by its writer, so whoever cleans up knows debris from work without
looking at clocks. It is named after its key: what a killed writer left can be taken over by the
next one of the same artifact. Blobs that the store already has are held by a hard link instead of
being written again: an eviction meanwhile cannot take them away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from blake3 import blake3
from typing_extensions import Buffer

from cache.blobs import hash_bytes, hash_threads, stamp_of
from cache.errors import CacheError, ClaimLost, CorruptArtifact
from cache.files import clear_errors, sync_all, try_lock, write_all, write_atomic
from cache.keys import check_digest, is_digest
from cache.manifest import Manifest, TensorRecord

if TYPE_CHECKING:
    from cache.disk import DiskStore

LOCK_NAME = "lock"
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS})


class ArtifactWriter:
    """Writes one artifact. A context manager: leaving it without `commit` leaves nothing behind.

    Not thread-safe; one artifact, one writer. Made by `DiskStore.writer`.

    Attributes:
        folder: where it is staged. Whoever writes may keep notes there, which outlive only a kill.
        resumed: it was taken over from a killed writer, with every whole blob that one had put.
    """

    def __init__(self, store: DiskStore, key: str, *, resume: bool = False) -> None:
        self.key = key
        self._store = store
        self._room = 0
        self._staged: set[str] = set()
        self._written: set[str] = set()
        self._closed = False
        self.folder = store.staging / f"{key}.{uuid.uuid4().hex}"
        with clear_errors(f"cannot write to the cache at {store.root}"), store.locked():
            lock = self._take_over() if resume else None
            self.resumed = lock is not None
            if lock is None:
                self.folder.mkdir()
                lock = try_lock(self.folder / LOCK_NAME, fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)
        assert lock is not None  # the folder is new and nobody else knows its name
        self._lock = lock
        if self.resumed:
            with clear_errors(f"cannot go on with artifact {key}"):
                self._prove()

    def _take_over(self) -> int | None:
        """The lock of the folder that a dead writer of this key left; None when there is none."""
        for folder in self._store.staging.glob(f"{self.key}.*"):
            if (lock := try_lock(folder / LOCK_NAME, fcntl.LOCK_EX)) is not None:
                self.folder = folder
                return lock
        return None

    def _prove(self) -> None:
        """Take in the blobs that are what their names say; remove torn and half-written ones."""
        for path in self.folder.iterdir():
            if path.suffix == ".part":
                path.unlink()
            elif is_digest(path.name):
                if blake3().update_mmap(path).hexdigest() == path.name:
                    self.staged(path.name)
                else:
                    path.unlink()

    def put(self, name: str, data: Buffer, dtype: str, shape: Sequence[int]) -> TensorRecord:
        """Store one tensor's bytes (C-contiguous, little-endian) and describe it.

        Bytes already in the store are not written again.

        Raises:
            ValueError: `data` is not `shape` × `dtype` long, or the dtype is unknown.
            CacheFull: no room for it; the whole artifact is given up by leaving the writer.
        """
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        record = TensorRecord(
            digest=hash_bytes(view), dtype=dtype, shape=tuple(shape), nbytes=view.nbytes
        )
        if not self.hold(record.digest, record.nbytes):
            with self.blob(record.nbytes) as blob:
                blob.write(view)
                blob.finish(record.digest)
        return record

    def hold(self, digest: str, nbytes: int) -> bool:
        """Take a blob the store already has into this artifact; False when it has to be written."""
        self._check_open()
        if digest in self._staged:
            return True
        if not self._store.blobs.present(check_digest(digest), nbytes):
            return False
        try:
            os.link(self._store.blobs.path(digest), self.folder / digest)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False  # a file system without links: write it again, identical
            with clear_errors(f"cannot hold blob {digest}"):
                raise
        self._staged.add(digest)
        return True

    def has(self, digest: str) -> bool:
        """Whether the blob is staged."""
        return digest in self._staged

    def staged(self, digest: str) -> None:
        """A `BlobWriter` has put `digest`, proven, into the staging folder."""
        self._staged.add(digest)
        self._written.add(digest)

    def blob(self, nbytes: int) -> BlobWriter:
        """Stream one blob of `nbytes` whose bytes come piece by piece."""
        self._check_open()
        if nbytes > self._room:
            self._room = self._store.make_room(nbytes)
        self._room -= nbytes
        return BlobWriter(self, self.folder, nbytes)

    def commit(self, manifest: Manifest, *, guard: Callable[[], bool] | None = None) -> None:
        """Publish: from here on `DiskStore.read` serves it. A second commit of a key replaces it.

        Args:
            guard: asked under the store's lock, right before publishing; False means that another
                builder took over.

        Raises:
            CacheError: the manifest is of another key or names blobs that were not put.
            ClaimLost: `guard` said no.
            CacheFull: no room for the manifest.
        """
        self._check_open()
        if manifest.key != self.key:
            raise CacheError(f"manifest of {manifest.key} given to the writer of {self.key}")
        missing = [digest for digest in manifest.blobs if digest not in self._staged]
        if missing:
            raise CacheError(f"{len(missing)} blobs of {self.key} were never put")
        data = manifest.to_json()
        Manifest.from_json(data)  # what cannot be read back must not be published
        with clear_errors(f"cannot publish artifact {self.key}"):
            sync_all(self.folder / digest for digest in self._written)
            # A rename keeps the stamp, and whatever happens to the file afterwards changes it.
            stamps = {d: stamp_of((self.folder / d).stat()) for d in self._written}
        with clear_errors(f"cannot publish artifact {self.key}"), self._store.locked():
            if guard is not None and not guard():
                raise ClaimLost(f"artifact {self.key}: another builder took over")
            self._publish_blobs(manifest)
            write_atomic(self._store.manifest_path(self.key), data)
        for digest, stamp in stamps.items():
            self._store.blobs.trust(digest, stamp)
        self.abort()
        self._store.published(self.key)

    def abort(self) -> None:
        """Give up and remove everything staged. Idempotent; nothing to do after `commit`."""
        if self._closed:
            return
        self._closed = True
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def _publish_blobs(self, manifest: Manifest) -> None:
        """Move staged blobs to their places, under the store's lock."""
        folders: set[Path] = set()
        for digest, nbytes in manifest.blobs.items():
            target = self._store.blobs.path(digest)
            if not self._store.blobs.present(digest, nbytes):
                target.parent.mkdir(exist_ok=True)
                (self.folder / digest).replace(target)
                folders.add(target.parent)
        if folders:
            sync_all([*folders, self._store.blobs.folder])

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError(f"the writer of {self.key} is closed")

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class BlobWriter:
    """One blob being written. A context manager: leaving it without `finish` removes it."""

    def __init__(self, writer: ArtifactWriter, folder: Path, nbytes: int) -> None:
        self._writer = writer
        self._nbytes = nbytes
        self._got = 0
        self._hash = blake3(max_threads=hash_threads(nbytes))
        self._temporary = folder / f"{uuid.uuid4().hex}.part"
        with clear_errors("cannot write a blob"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(self._temporary, flags, 0o600)

    def write(self, data: Buffer) -> None:
        """Append bytes. Raises `CorruptArtifact` past the announced length, `CacheFull`."""
        view = memoryview(data)
        self._got += view.nbytes
        if self._got > self._nbytes:
            raise CorruptArtifact(f"a blob of {self._nbytes} bytes goes on after its end")
        self._hash.update(view)
        with clear_errors("cannot write a blob"):
            write_all(self._descriptor, view)

    def finish(self, digest: str) -> None:
        """Stage the blob under its digest. Raises `CorruptArtifact` when the bytes are others."""
        if self._got != self._nbytes:
            raise CorruptArtifact(f"blob {digest}: {self._got} bytes instead of {self._nbytes}")
        if self._hash.hexdigest() != check_digest(digest):
            raise CorruptArtifact(f"blob {digest}: its bytes do not match its digest")
        with clear_errors(f"cannot write blob {digest}"):
            self._temporary.replace(self._temporary.with_name(digest))
        self._writer.staged(digest)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
