"""What this process holds of memory, and giving back pages of mapped files. Torch-free."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

_DONTNEED = 4
_CGROUP = Path("/sys/fs/cgroup")


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def drop_pages(address: int, nbytes: int) -> None:
    """Unmap the whole pages inside a range of a mapped file that was never written to.

    They count no more to this process and come back from the file when they are read again. Pages
    that the range shares with its neighbours stay.
    """
    libc = _libc()
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if libc is not None and size > 0:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONTNEED)


def free_memory() -> int | None:
    """Bytes that this process may still take without pushing others out; None where unknown.

    The machine's available memory, or what the container's limit leaves if that is less.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    lines = (line.split() for line in meminfo.splitlines())
    free = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return free
    if limit == "max" or free is None:
        return free
    cached = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
    return max(0, min(free, int(limit) - used + cached))
