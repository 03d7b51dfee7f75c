"""Durable file steps: atomic replacement, folder fsync, host-wide locks, clear errors.

Knows nothing of artifacts. Every function blocks; async callers use a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.errors import CacheError, CacheFull

_SYNC_THREADS = 16
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def clear_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` into `CacheFull` (no space, quota, file limit) or `CacheError`."""
    try:
        yield
    except OSError as error:
        kind = CacheFull if error.errno in FULL else CacheError
        raise kind(f"{doing}: {error.strerror or error}") from error


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Hold an advisory lock over all processes and threads of the host; the kernel frees it."""
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path, mode: int, flags: int = os.O_RDONLY) -> int | None:
    """Open and lock a file without waiting; its descriptor, or None when absent or held.

    Args:
        mode: `fcntl.LOCK_SH` or `fcntl.LOCK_EX`.
    """
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def sync_all(paths: Iterable[Path]) -> None:
    """Make files and folders durable, many at a time.

    The file system then commits them in groups: 300 small files took 0.04 s, one by one 1.2 s.
    """
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        for _ in pool.map(_sync, paths):
            pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte of `data` (bytes, contiguous), whatever the kernel takes at once."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: readers see the old bytes or the new, also after a crash."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_all(descriptor, memoryview(data))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)
