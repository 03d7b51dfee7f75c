"""Recorded traffic: reads request traces in the format of the Azure LLM inference traces.

CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens, in any order; others are ignored.
TIMESTAMP is a date and time or plain seconds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Final

from gateway.errors import InvalidRequest
from gateway.policy.budget import Sla

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MAX_TOKENS: Final = 10**7
MAX_SECONDS: Final = 1e8  # three years: times stay exact to the microsecond


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. `time_s` counts from the first."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    sla: Sla = field(default_factory=Sla)


def read_trace(path: Path, *, limit: int | None = None) -> tuple[Arrival, ...]:
    """The first `limit` requests of a trace file (None: all), in order of time.

    Raises:
        InvalidRequest: the file cannot be read, lacks a column, or holds a bad value; the message
            names the line and the column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(islice(_rows(path, file), limit))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}", param="trace") from None
    if not rows:
        raise InvalidRequest(f"{path}: holds no requests", param="trace")
    rows.sort(key=lambda row: row[0])
    start = rows[0][0]
    if rows[-1][0] - start > MAX_SECONDS:
        raise InvalidRequest(f"{path}: TIMESTAMP: spans more than {MAX_SECONDS:g} s", param="trace")
    return tuple(Arrival(time - start, prompt, output) for time, prompt, output in rows)


def scaled(
    arrivals: Iterable[Arrival], *, time: float = 1.0, length: float = 1.0
) -> tuple[Arrival, ...]:
    """The same traffic spread over `time` times as long, with `length` times as many tokens."""
    return tuple(
        replace(
            arrival,
            time_s=arrival.time_s * time,
            prompt_tokens=max(1, round(arrival.prompt_tokens * length)),
            output_tokens=max(1, round(arrival.output_tokens * length)),
        )
        for arrival in arrivals
    )


def _rows(path: Path, file: Iterable[str]) -> Iterator[tuple[float, int, int]]:
    reader = csv.DictReader(file)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest(
            f"{path}:1: no column {', '.join(missing)}; a trace has {', '.join(COLUMNS)}",
            param="trace",
        )
    for row in reader:
        at = f"{path}:{reader.line_num}"
        yield (
            _time(at, row["TIMESTAMP"]),
            _count(at, "ContextTokens", row["ContextTokens"]),
            _count(at, "GeneratedTokens", row["GeneratedTokens"]),
        )


def _time(at: str, text: str | None) -> float:
    text = (text or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            seconds = math.nan
    if not math.isfinite(seconds):
        raise InvalidRequest(
            f"{at}: TIMESTAMP: {text!r} is neither a date and time nor seconds", param="trace"
        )
    return seconds


def _count(at: str, column: str, text: str | None) -> int:
    """At least 1: a request has a prompt, and its prefill yields a token."""
    try:
        count = int(text or "")
    except ValueError:
        count = -1
    if not 0 <= count <= MAX_TOKENS:
        raise InvalidRequest(
            f"{at}: {column}: {text!r} is not a number of tokens (0 to {MAX_TOKENS})",
            param="trace",
        )
    return max(1, count)
