"""Facts that make a number readable later: machine, versions, command, settings. No secrets."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("pressgate", "aiohttp", "numpy")


def provenance(started_at: float) -> dict[str, Any]:
    """Where, when, with what and by which command a report was made. `started_at` is Unix time.

    The API key never appears: it is read from the environment, not from the command line.
    """
    return {
        "command": shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
        "started_at": datetime.fromtimestamp(started_at, UTC).isoformat(timespec="seconds"),
        "host": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": os.getloadavg(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
