"""Use counts: they decay, survive the process, and are written lazily."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.uses import HALF_LIFE_SECONDS, Use, UseLog, parse_use


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_count_halves_every_day() -> None:
    use = Use().bumped(0.0, by=8.0)
    assert use.now(HALF_LIFE_SECONDS) == pytest.approx(4.0)
    assert use.now(3 * HALF_LIFE_SECONDS) == pytest.approx(1.0)
    assert use.bumped(3 * HALF_LIFE_SECONDS).score == pytest.approx(2.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_clocks_that_jump_never_lose_a_use(moments: list[float]) -> None:
    use = Use()
    for moment in moments:
        before = use.now(moment)
        use = use.bumped(moment)
        assert use.score == pytest.approx(before + 1)
    assert use.at == max(moments)


def test_uses_are_read_at_once_written_lazily_and_kept(tmp_path: Path) -> None:
    clock = Clock()
    log = UseLog(tmp_path / "uses", clock=clock)
    for _ in range(3):
        log.touch("key")
    assert log.read("key").now(clock.now) == pytest.approx(3.0)
    assert UseLog(tmp_path / "uses", clock=clock).read("key") == Use()
    clock.now += 60
    log.touch("key")
    again = UseLog(tmp_path / "uses", clock=clock)
    assert again.read("key").now(clock.now) == pytest.approx(4.0, rel=1e-2)
    again.touch("other", flush=True)
    again.keep_only(["other"])
    assert log.read("key") == Use()
    assert log.read("other").now(clock.now) == pytest.approx(1.0)
    log.forget("other")
    assert again.read("other") == Use()


@pytest.mark.parametrize("data", [None, b"", b"{", b'{"score": -1}', b'{"score": "NaN"}', b"[]"])
def test_an_unreadable_count_is_none(data: bytes | None) -> None:
    assert parse_use(data) == Use()
