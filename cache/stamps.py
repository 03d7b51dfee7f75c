"""Ids that carry their time: a prefix, then a ULID (48 bits of Unix milliseconds, 80 random bits)
in Crockford's base 32, so that ids of one prefix sort by time.
"""

from __future__ import annotations

import re
from secrets import randbits
from typing import Final

_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS: Final = tuple(high + low for high in _DIGITS for low in _DIGITS)
_TIME_DIGITS: Final = 10
_DIGITS_IN_ALL: Final = 26
_LAST_MS: Final = 2**48 - 1
_STAMP: Final = re.compile(rf"([a-z]{{1,8}})-([0-7][{_DIGITS}]{{{_DIGITS_IN_ALL - 1}}})")


def new_stamp(prefix: str, at: float) -> str:
    """A fresh id of the moment `at` (Unix seconds)."""
    return f"{prefix}-{_written(_ms(at) << 80 | randbits(80))}"


def first_stamp(prefix: str, at: float) -> str:
    """The least id of a moment: every id made before it is smaller."""
    return f"{prefix}-{_written(_ms(at) << 80)}"


def stamped_at(prefix: str, stamp: str) -> float | None:
    """The moment (Unix seconds) of an id; None when it is no id of this prefix."""
    found = _STAMP.fullmatch(stamp)
    if found is None or found[1] != prefix:
        return None
    value = 0
    for digit in found[2][:_TIME_DIGITS]:
        value = value << 5 | _DIGITS.index(digit)
    return value / 1000.0


def _ms(at: float) -> int:
    return min(_LAST_MS, max(0, round(1000.0 * at)))


def _written(value: int) -> str:
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])
