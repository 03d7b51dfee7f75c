"""When a policy applies: hours of the day on days of the week, in a timezone. Pure: the time is
given in."""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Final, Literal
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MIDNIGHT: Final = 24 * 60

_CLOCK = re.compile(r"^(\d{1,2}):(\d{2})$")
_PATTERN = r"^([01]?[0-9]|2[0-3]):[0-5][0-9]$|^24:00$"


def _minute(value: object) -> int:
    """Minutes since midnight. A whole number is one already: YAML reads `17:30` without quotes as
    60 × 17 + 30."""
    minute = -1
    if isinstance(value, str) and (found := _CLOCK.match(value)) and int(found[2]) < 60:
        minute = 60 * int(found[1]) + int(found[2])
    elif isinstance(value, int) and not isinstance(value, bool):
        minute = value
    if not 0 <= minute <= MIDNIGHT:
        raise ValueError("must be a time of day from 00:00 to 24:00, such as 17:30")
    return minute


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def _known_zone(name: str) -> str:
    try:
        _zone(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"no timezone {name!r}; write an IANA name such as Europe/Berlin or UTC"
        ) from None
    return name


_Minute = Annotated[
    int,
    BeforeValidator(_minute),
    PlainSerializer(_clock, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _PATTERN}),
]


class Hours(BaseModel):
    """From `start` up to, not including, `end`, on `days`, by the wall clock of `zone`.

    When `end` is before `start` the window goes past midnight and belongs to the day it began on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: _Minute = 0
    end: _Minute = MIDNIGHT
    days: Annotated[tuple[Day, ...], Field(min_length=1, max_length=7)] = DAYS
    zone: Annotated[str, Field(max_length=64), AfterValidator(_known_zone)] = "UTC"

    @model_validator(mode="after")
    def _some_time(self) -> Hours:
        if self.start % MIDNIGHT == self.end:
            raise ValueError("start and end are the same; leave both out for the whole day")
        return self

    def hold(self, now: float) -> bool:
        """Whether `now`, in Unix seconds, lies within."""
        local = datetime.fromtimestamp(now, _zone(self.zone))
        minute, day = 60 * local.hour + local.minute, local.weekday()
        if self.start < self.end:
            return self.start <= minute < self.end and DAYS[day] in self.days
        if minute >= self.start:
            return DAYS[day] in self.days
        return minute < self.end and DAYS[day - 1] in self.days
