"""Blobs on disk: where they lie, how they are mapped, and the proof that they are what they say.

A blob is mapped copy-on-write: readable and writable memory that shares the page cache with every
other process until someone writes to it, and never changes the file. One mapping of a digest serves
all artifacts of the process. No file descriptor stays open per mapping, so thousands of tensors fit
under a common descriptor limit (`mmap.mmap` keeps one each before Python 3.13).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

from cache.errors import CacheError, CorruptArtifact
from cache.keys import check_digest

_THREADED_BYTES = 2**20  # below this, waking threads costs more than hashing
Stamp = tuple[int, int, int, int]


def hash_bytes(data: memoryview | bytes) -> str:
    """BLAKE3 of `data` as 64 hex digits, on all cores when that pays."""
    return blake3(data, max_threads=hash_threads(len(data))).hexdigest()


def hash_threads(nbytes: int) -> int:
    """`max_threads` for a BLAKE3 over `nbytes`."""
    return blake3.AUTO if nbytes >= _THREADED_BYTES else 1


def stamp_of(status: os.stat_result) -> Stamp:
    """What tells one content of a file from another without reading it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class BadBlob(CorruptArtifact):
    """One blob is missing (`stamp` None), short, or not what its name says."""

    def __init__(self, digest: str, stamp: Stamp | None, why: str) -> None:
        super().__init__(f"blob {digest}: {why}")
        self.digest = digest
        self.stamp = stamp


class Blobs:
    """The blobs under one folder, `<first two digits>/<digest>`. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: dict[str, Stamp] = {}
        self._mapped: weakref.WeakValueDictionary[str, ctypes.Array[ctypes.c_ubyte]] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path:
        check_digest(digest)
        return self.folder / digest[:2] / digest

    def open(self, digest: str, nbytes: int, *, trust: bool = True) -> memoryview:
        """Map a blob, `nbytes` long, and prove it.

        Args:
            trust: take this process's earlier proof of the unchanged file (same inode, size and
                modification time); False hashes again.

        Raises:
            BadBlob: missing, of another size, or of another digest.
            CacheError: the file cannot be opened or mapped for another reason.
        """
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY)
        except FileNotFoundError:
            raise BadBlob(digest, None, "missing") from None
        except OSError as error:
            raise CacheError(f"blob {digest}: {error.strerror}") from error
        try:
            stamp = stamp_of(os.fstat(descriptor))
            if stamp[2] != nbytes:
                raise BadBlob(digest, stamp, f"{stamp[2]} bytes instead of {nbytes}")
            with self._lock:
                known = trust and self._verified.get(digest) == stamp
                memory = self._mapped.get(digest) if known else None
            if memory is None:
                memory = _map(descriptor, nbytes)
        finally:
            os.close(descriptor)
        view = memoryview(memory).cast("B")
        if not known and hash_bytes(view) != digest:
            self.forget(digest)
            raise BadBlob(digest, stamp, "its bytes do not match its digest")
        with self._lock:
            self._verified[digest] = stamp
            self._mapped[digest] = memory
        return view

    def prefetch(self, digests: Iterable[str]) -> None:
        """Let the kernel begin to read blobs that are about to be opened. Never fails."""
        for digest in digests:
            with self._lock:
                known = digest in self._mapped
            if known or not hasattr(os, "posix_fadvise"):
                continue
            with suppress(OSError):
                descriptor = os.open(self.path(digest), os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def trust(self, digest: str, stamp: Stamp) -> None:
        """Remember a file that this process has hashed while writing it as proven."""
        with self._lock:
            self._verified[digest] = stamp

    def forget(self, digest: str) -> None:
        """Drop the proof and the shared mapping; views handed out stay valid."""
        with self._lock:
            self._verified.pop(digest, None)
            self._mapped.pop(digest, None)

    def present(self, digest: str, nbytes: int) -> bool:
        """There is a file of that name and size; says nothing of its content."""
        try:
            return self.path(digest).stat().st_size == nbytes
        except FileNotFoundError:
            return False

    def listing(self) -> dict[str, int]:
        """Digest → bytes of every blob file."""
        found: dict[str, int] = {}
        for folder in self.folder.iterdir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        found[entry.name] = entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue  # another process removed it meanwhile
        return found


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, size]
    return library


def _map(descriptor: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """A private mapping of a whole file, unmapped when its last view dies."""
    if nbytes == 0:
        return (ctypes.c_ubyte * 0)()
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc().mmap(None, nbytes, access, mmap.MAP_PRIVATE, descriptor, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise CacheError(f"cannot map {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, _libc().munmap, address, nbytes).atexit = False
    return memory
