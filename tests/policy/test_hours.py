"""Hours of the day: what is accepted, and when they hold. Times are given in, none is read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.policy.hours import DAYS, Hours


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


OFFICE = Hours(start="09:00", end="17:30", days=("mon", "tue", "wed", "thu", "fri"))
NIGHT = Hours(start="22:00", end="06:00", days=("fri",), zone="Europe/Berlin")
WEEKEND = Hours(days=("sat", "sun"))


@pytest.mark.parametrize(
    ("hours", "when", "holds"),
    [  # 2026-11-23 is a Monday
        pytest.param(OFFICE, at("2026-11-23 09:00"), True, id="the first minute"),
        pytest.param(OFFICE, at("2026-11-23 08:59:59"), False, id="just before"),
        pytest.param(OFFICE, at("2026-11-23 17:29:59"), True, id="the last second"),
        pytest.param(OFFICE, at("2026-11-23 17:30"), False, id="the end is not in it"),
        pytest.param(OFFICE, at("2026-11-22 12:00"), False, id="Sunday"),
        pytest.param(WEEKEND, at("2026-11-22 23:59"), True, id="a whole day"),
        pytest.param(WEEKEND, at("2026-11-23 00:00"), False, id="the next"),
        pytest.param(NIGHT, at("2026-11-27 23:00", "Europe/Berlin"), True, id="Friday night"),
        pytest.param(NIGHT, at("2026-11-28 05:59", "Europe/Berlin"), True, id="into Saturday"),
        pytest.param(NIGHT, at("2026-11-28 06:00", "Europe/Berlin"), False, id="until six"),
        pytest.param(NIGHT, at("2026-11-28 23:00", "Europe/Berlin"), False, id="not Saturday's"),
        pytest.param(NIGHT, at("2026-11-27 05:00", "Europe/Berlin"), False, id="not Thursday's"),
        pytest.param(NIGHT, at("2026-11-27 21:30"), True, id="by the zone's clock"),
        pytest.param(NIGHT, at("2026-07-03 20:30"), True, id="by its summer time"),
        pytest.param(NIGHT, at("2026-11-27 20:30"), False, id="which is over in November"),
    ],
)
def test_when_they_hold(hours: Hours, when: float, holds: bool) -> None:
    assert hours.hold(when) is holds


@pytest.mark.parametrize(
    ("given_", "fault"),
    [
        ({"start": "25:00"}, "00:00 to 24:00"),
        ({"start": "9:60"}, "00:00 to 24:00"),
        ({"start": "9"}, "00:00 to 24:00"),
        ({"end": -1}, "00:00 to 24:00"),
        ({"end": True}, "00:00 to 24:00"),
        ({"start": "9:00", "end": "09:00"}, "the same"),
        ({"start": "00:00", "end": "00:00"}, "the same"),
        ({"zone": "Europe/Nowhere"}, "IANA"),
        ({"zone": "../../etc/passwd"}, "IANA"),
        ({"zone": ""}, "IANA"),
        ({"days": []}, "at least 1"),
        ({"days": ["monday"]}, "'mon'"),
        ({"from": "9:00"}, "Extra inputs"),
    ],
)
def test_what_is_refused(given_: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Hours(**given_)


def test_yaml_without_quotes_means_the_same() -> None:
    """YAML 1.1 reads 17:30 as a number in base 60, and 09:00 as text."""
    read = yaml.safe_load("{start: 09:00, end: 17:30}")
    assert read == {"start": "09:00", "end": 1050}
    assert Hours(**read) == Hours(start="09:00", end="17:30")
    assert Hours(**read).model_dump(mode="json")["end"] == "17:30"


minutes = st.integers(0, 1440)


@given(minutes, minutes, st.sets(st.sampled_from(DAYS), min_size=1), st.integers(0, 7 * 1440 - 1))
def test_every_week_has_as_many_minutes_as_the_windows_say(
    start: int, end: int, days: set[Any], offset: int
) -> None:
    """Against a naive walk: the window opened on a day, and has it closed since?"""
    if start % 1440 == end:
        return
    hours = Hours(start=start, end=end, days=tuple(days))
    monday = datetime(2026, 11, 23, tzinfo=UTC)
    now = monday + timedelta(minutes=offset)
    length = end - start if start < end else 1440 - start + end
    opened = [
        monday + timedelta(days=day, minutes=start) for day in range(-7, 7) if DAYS[day % 7] in days
    ]
    inside = any(begin <= now < begin + timedelta(minutes=length) for begin in opened)
    assert hours.hold(now.timestamp()) is inside
