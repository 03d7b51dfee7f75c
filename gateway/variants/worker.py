"""The build worker: `python -m gateway.variants.worker`, one `BuildSpec` on stdin, JSON lines out.

Lines are `{"progress": share, "message": text}` and at the end either a result object or
`{"error": text}`. The process lowers its priority and dies with its parent.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import Any, BinaryIO

import orjson

from gateway.variants.spec import BuildSpec

_PR_SET_PDEATHSIG = 1
_NICEST = 19
_M_MMAP_THRESHOLD, _MAPPED_FROM = -3, 4 * 2**20  # bytes of a tensor that goes back when freed


def main() -> int:
    """Do the build; 0 when a result or an orderly error was written."""
    out = take_stdout()
    spec = BuildSpec.model_validate_json(sys.stdin.buffer.read())
    _be_humble(spec.nice, spec.threads)

    def say(message: dict[str, Any]) -> None:
        out.write(orjson.dumps(message) + b"\n")
        out.flush()

    def progress(share: float, message: str) -> None:
        say({"progress": share, "message": message})

    progress(0.0, "loading libraries")
    # Imported here: torch reads the thread limits set above.
    from cache.errors import CacheError
    from compressors.base import CompressionError
    from gateway.variants.build import build

    try:
        say(build(spec, progress, lambda event, what: say({"event": event, "what": what})))
    except (CompressionError, CacheError, OSError, MemoryError, ValueError) as error:
        logging.getLogger(__name__).exception("build of %s", spec.level)
        say({"error": f"{type(error).__name__}: {error}"})
    return 0


def take_stdout() -> BinaryIO:
    """Keep stdout for our lines; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def _be_humble(nice: int, threads: int) -> None:
    """Lowest priority, few threads, and no life after the parent's."""
    os.nice(nice)
    if nice == _NICEST and hasattr(os, "SCHED_IDLE"):
        # A niced process still makes serving wait for its slice; an idle one gives way at once.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if hasattr(libc, "mallopt"):  # glibc keeps freed tensors of every thread for itself
            libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


if __name__ == "__main__":
    sys.exit(main())
