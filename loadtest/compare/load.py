"""`compare load`: a stored level into memory against reading the same bytes; what it then takes.

A process of its own first builds the level and loads it once, as a gateway's worker does: what is
settled then is kept beside it. Every run is a new process that has served another level before (its
libraries are loaded), because only the first load of a process proves the bytes by their digests.
Between any two steps the file cache is told to drop the files; where it does not, both sides read
from memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.compare import markdown
from loadtest.peers.child import Child
from loadtest.peers.engines import Case, pace
from loadtest.peers.place import Place

_PROMPT = 16
_ANSWER = 64
_KV_BYTES = 64 * 2**20
_MB = 1e6


def measure(place: Place, cases: Sequence[Case], runs: int) -> dict[str, Any]:
    """Times and bytes of every case's level. Raises: EngineError."""
    return {"rows": [_row(place, case, runs) for case in cases]}


def _row(place: Place, case: Case, runs: int) -> dict[str, Any]:
    with pace(place, case, kv_bytes=_KV_BYTES) as child:
        for kind in ("make", "load"):
            _do(child, kind, case.level)
    found = [_run(place, case, read_first=index % 2 == 0) for index in range(runs)]
    row: dict[str, Any] = {"shape": case.shape, "level": case.level, "runs": found}
    names = ("read_s", "load_s", "first_s", "again_s")
    row |= {name: statistics.median(run[name] for run in found) for name in names}
    row["share"] = statistics.median(run["read_s"] / run["load_s"] for run in found)
    # The first token's own work is not loading; what it took longer than the second time is.
    row["share_to_token"] = statistics.median(
        run["read_s"] / (run["load_s"] + max(0.0, run["first_s"] - run["again_s"])) for run in found
    )
    return row | _memory(place, case)


def _run(place: Place, case: Case, *, read_first: bool) -> dict[str, float]:
    """Seconds of reading, loading, the first token and another one."""
    if read_first:
        return _read(place, case) | _load(place, case)
    return _load(place, case) | _read(place, case)


def _read(place: Place, case: Case) -> dict[str, float]:
    """In a process that maps nothing of the level: what is mapped cannot be forgotten."""
    with pace(place, case, kv_bytes=_KV_BYTES) as child:
        _do(child, "forget", case.level)
        return {"read_s": _do(child, "read", case.level)["seconds"]}


def _load(place: Place, case: Case) -> dict[str, float]:
    other = "bf16" if case.level != "bf16" else "int8+embed8"
    with pace(place, case, kv_bytes=_KV_BYTES) as child:
        for kind in ("make", "load", "prefill"):
            _do(child, kind, other, tokens=_PROMPT)
        _do(child, "forget", case.level)
        seconds = {"load_s": _do(child, "load", case.level)["seconds"]}
        for name in ("first_s", "again_s"):
            seconds[name] = _do(child, "prefill", case.level, tokens=_PROMPT)["seconds"]
        return seconds


def _memory(place: Place, case: Case) -> dict[str, Any]:
    """Bytes of a process that serves this level alone, after an answer."""
    with pace(place, case, kv_bytes=_KV_BYTES) as child:
        _do(child, "load", case.level)
        _do(child, "decode", case.level, prompt=_PROMPT, tokens=_ANSWER)
        facts = _do(child, "facts", case.level)
    allowed = 1.1 * facts["stored_bytes"] + facts["kv_bytes"] + 300 * _MB
    return facts | {"allowed_bytes": allowed}


def _do(child: Child, kind: str, level: str, **more: int) -> dict[str, Any]:
    return child.ask({"kind": kind, "level": level, **more})


def show(report: Mapping[str, Any]) -> list[str]:
    """Loading, then memory."""
    rows = report["rows"]
    times = [
        [
            row["shape"],
            row["level"],
            markdown.number(row["stored_bytes"] / _MB),
            *(
                markdown.number(1000 * row[name])
                for name in ("read_s", "load_s", "first_s", "again_s")
            ),
            f"{100 * row['share']:.0f} %",
            f"**{100 * row['share_to_token']:.0f} %**",
        ]
        for row in rows
    ]
    head = ["shape", "level", "MB stored", "read ms", "load ms", "first token ms", "next ms"]
    head += ["read ÷ load", "read ÷ load to first token"]
    sizes = [
        [
            row["shape"],
            row["level"],
            *(
                markdown.number(row[name] / _MB)
                for name in (
                    "stored_bytes",
                    "resident_bytes",
                    "kv_bytes",
                    "process_bytes",
                    "allowed_bytes",
                )
            ),
        ]
        for row in rows
    ]
    bytes_head = [
        "shape",
        "level",
        "stored MB",
        "tensors",
        "KV",
        "process",
        "1.1 × stored + KV + 300",
    ]
    return [markdown.table(head, times, 2), markdown.table(bytes_head, sizes, 2)]
