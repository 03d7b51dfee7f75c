"""The `predict` command: its plan and what it makes of answers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from loadtest.client import Outcome
from loadtest.mix import Lengths, TrafficClass
from loadtest.predict import Load, arrivals
from loadtest.predict_report import PHASES, answers, show, summarize
from loadtest.workloads import DefaultLengths, Planned

LENGTHS = DefaultLengths(prompt=Lengths(low=8, high=8), output=Lengths(low=8, high=8))
ENDS = [10.0, 20.0, 30.0, 40.0]


def outcome(at: float, level: str = "bf16", status: Any = "ok", **told: Any) -> Outcome:
    """`told`: predicted and measured numbers; a name with `measured_` in front is the latter."""
    planned = Planned(0, at, TrafficClass(name="a"), "the", 8, 8)
    measured = {n.removeprefix("measured_"): v for n, v in told.items() if n.startswith("measured")}
    predicted = {n: v for n, v in told.items() if not n.startswith("measured")}
    compression = {"level": level, "predicted": predicted, "measured": measured}
    return Outcome(planned, 0.0, 0.0, status=status, compression=compression)


def test_the_burst_is_so_many_times_as_dense_and_every_phase_has_its_place() -> None:
    found, ends = arrivals(Load(50.0, 4.0, (10.0, 10.0, 10.0, 10.0), LENGTHS, 3))
    assert ends == ENDS
    times = [arrival.at for arrival in found if arrival.at is not None]
    assert times == sorted(times)
    counts = [sum(low <= t < low + 10 for t in times) for low in (0, 10, 20, 30)]
    assert counts[2] == pytest.approx(4 * 500, rel=0.1)
    assert [counts[i] for i in (0, 1, 3)] == pytest.approx([500] * 3, rel=0.2)


def test_errors_and_kept_bounds_by_phase_and_level() -> None:
    high: dict[str, Any] = {"ttft_high_ms": 150.0, "tpot_high_ms": 12.0, "confidence": 0.95}
    found = answers(
        [
            outcome(11, ttft_ms=100, tpot_ms=10, measured_ttft_ms=200, measured_tpot_ms=10, **high),
            outcome(12, ttft_ms=100, tpot_ms=9, measured_ttft_ms=80, measured_tpot_ms=10, **high),
            outcome(25, "int8", ttft_ms=50, measured_ttft_ms=50),
            outcome(13, status="error", ttft_ms=1, measured_ttft_ms=50),
            outcome(14, ttft_ms=10, measured_ttft_ms=None),
        ],
        ENDS,
    )
    report = summarize(found)
    steady = report["phases"]["steady"]["all"]
    assert steady == report["phases"]["steady"]["bf16"]
    assert steady["ttft"]["mape"] == pytest.approx((0.5 + 0.25) / 2)
    assert steady["ttft"]["bias"] == pytest.approx((-0.5 + 0.25) / 2)
    assert steady["ttft"]["kept"] == 0.5
    assert steady["tpot"]["mape"] == pytest.approx(0.05)
    assert steady["tpot"]["kept"] == 1.0
    burst = report["phases"]["burst"]["int8"]
    assert burst["ttft"]["mape"] == 0.0
    assert burst["ttft"]["kept"] is None, "nothing was promised"
    assert report["confidence"] == [0.95]
    assert report["all_but_warm_up"]["ttft"]["answers"] == 3


def test_answers_of_other_servers_count_for_nothing() -> None:
    other = Outcome(Planned(0, 1.0, TrafficClass(name="a"), "the", 8, 8), 0.0, 0.0, status="ok")
    assert answers([other], ENDS) == []


def test_the_table_shows_what_was_found() -> None:
    found = answers([outcome(1, ttft_ms=100, measured_ttft_ms=80)], ENDS)
    text = io.StringIO()
    show(summarize(found), Console(file=text, width=200))
    assert "25.0" in text.getvalue()
    assert PHASES[0] in text.getvalue()
