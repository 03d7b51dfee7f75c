"""Recorded traffic: reads request traces, the Azure LLM inference traces' or the gateway's own.

CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens, in any order; others are ignored.
TIMESTAMP is a date and time (UTC unless it says otherwise) or plain seconds. JSON lines, as the
gateway logs its decisions: see `Record`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gateway.errors import InvalidRequest
from gateway.policy.budget import Sla

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MAX_TOKENS: Final = 10**7
MAX_LINE: Final = 2**20  # characters of the first line, which tells the format
MAX_SECONDS: Final = 1e8  # three years: times stay exact to the microsecond


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        time_s: counts from the first.
        max_tokens: what it asked for; None: as many as it got.
        at: when it came, in Unix seconds, for policies that look at the hour.
        key, path, model: the caller's API key and what it called; empty where nobody recorded it.
        pinned: the level it named.
        policy: the policy it fell under; None: not recorded.
        level: the level that served it; None: not recorded, or refused.
    """

    time_s: float
    prompt_tokens: int
    output_tokens: int
    sla: Sla = field(default_factory=Sla)
    max_tokens: int | None = None
    at: float = 0.0
    key: str | None = None
    path: str = ""
    model: str = ""
    policy: str | None = None
    level: str | None = None
    pinned: str | None = None


def _seconds(value: object) -> float:
    """Unix seconds of a number or of a date and time.

    Raises:
        ValueError: neither.
    """
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            value = float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be seconds or a date and time")
    return float(value)


class Record(BaseModel):
    """One line of the decision log, as far as a replay needs it; other fields are ignored.

    `ts` is the time of arrival. What generated nothing was refused: how long it would have been is
    not known, so it counts as long as it may have been.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    ts: Annotated[float, BeforeValidator(_seconds)]
    prompt_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)]
    generated_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    sla: Sla | None = None
    policy: str | None = None
    level: str | None = None
    pinned: str | None = None
    key: str | None = None
    path: str | None = None
    model: str | None = None

    def arrival(self) -> Arrival:
        """`time_s` is not known yet."""
        return Arrival(
            0.0,
            max(1, self.prompt_tokens),
            max(1, self.generated_tokens or self.max_tokens or 1),
            self.sla or Sla(),
            self.max_tokens,
            at=self.ts,
            key=self.key,
            path=self.path or "",
            model=self.model or "",
            policy=self.policy,
            level=self.level,
            pinned=self.pinned,
        )


def read_trace(path: Path, *, limit: int | None = None) -> tuple[Arrival, ...]:
    """The first `limit` requests of a trace file (None: all), in order of time.

    Raises:
        InvalidRequest: the file cannot be read, lacks a column, or holds a bad value; the message
            names the line and the column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline(MAX_LINE)
            lines = chain([first], file)
            rows = records(path, lines) if first.lstrip()[:1] == "{" else _rows(path, lines)
            arrivals = sorted(islice(rows, limit), key=lambda arrival: arrival.at)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}", param="trace") from None
    if not arrivals:
        raise InvalidRequest(f"{path}: holds no requests", param="trace")
    start = arrivals[0].at
    if arrivals[-1].at - start > MAX_SECONDS:
        raise InvalidRequest(f"{path}: TIMESTAMP: spans more than {MAX_SECONDS:g} s", param="trace")
    return tuple(replace(arrival, time_s=arrival.at - start) for arrival in arrivals)


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
            max_tokens=(
                None if arrival.max_tokens is None else max(1, round(arrival.max_tokens * length))
            ),
        )
        for arrival in arrivals
    )


def records(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    """Decisions, one JSON object a line; see `Record`.

    Raises:
        InvalidRequest: naming the line and the field.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            item = error.errors()[0]
            where = ".".join(str(part) for part in item["loc"])
            fault = f"{where}: {item['msg']}" if where else item["msg"]
            raise InvalidRequest(f"{path}:{number}: {fault}", param="trace") from None
        yield record.arrival()


def _rows(path: Path, file: Iterable[str]) -> Iterator[Arrival]:
    reader = csv.DictReader(file)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest(
            f"{path}:1: no column {', '.join(missing)}; a trace has {', '.join(COLUMNS)}",
            param="trace",
        )
    for row in reader:
        at = f"{path}:{reader.line_num}"
        yield Arrival(
            0.0,
            _count(at, "ContextTokens", row["ContextTokens"]),
            _count(at, "GeneratedTokens", row["GeneratedTokens"]),
            at=_time(at, row["TIMESTAMP"]),
        )


def _time(at: str, text: str | None) -> float:
    text = (text or "").strip()
    try:
        return _seconds(text)
    except ValueError:
        raise InvalidRequest(
            f"{at}: TIMESTAMP: {text!r} is neither a date and time nor seconds", param="trace"
        ) from None


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
