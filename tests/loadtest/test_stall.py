from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client import Outcome
from loadtest.mix import Goals, single_class
from loadtest.stall import compare, summarize
from loadtest.workloads import Planned
from tests.loadtest.standin import Behaviour, serve
from tests.loadtest.test_cli import loadtest

TRAFFIC = single_class(Goals()).classes[0]


def stream(times: list[float]) -> Outcome:
    outcome = Outcome(Planned(0, None, TRAFFIC, "p", 1, 1), 0.0, 0.0, "ok")
    outcome.token_times = times
    return outcome


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted), max_size=5),
    st.floats(0, 100),
    st.floats(0, 50),
)
def test_gaps_are_filed_by_whether_they_overlap_the_build(
    streams: list[list[float]], begin: float, length: float
) -> None:
    end = begin + length
    quiet, busy = [], []
    for times in streams:
        for start, stop in pairwise(times):
            if stop <= begin:
                quiet.append(1000 * (stop - start))
            elif start < end:
                busy.append(1000 * (stop - start))
    result = compare([stream(times) for times in streams], begin, end)
    for name, gaps in (("before", quiet), ("during", busy)):
        assert result[name]["gaps"] == len(gaps)
        if gaps:
            assert result[name]["p99_ms"] == pytest.approx(np.percentile(gaps, 99))
        else:
            assert result[name]["p99_ms"] is None


def test_the_median_of_the_runs_is_reported() -> None:
    runs = [{"p50_ratio": r, "p99_ratio": None, "build_seconds": 1.0} for r in (1.0, 9.0, 2.0)]
    assert summarize(runs)["median"] == {"p50_ratio": 2.0, "p99_ratio": None, "build_seconds": 1.0}


STALL = "stall --level int8 --model m --before 1 --runs 2 --streams 2 --max-tokens 20 --json"


def test_a_build_that_slows_streams_down_is_found(tmp_path: Path) -> None:
    behaviour = Behaviour(tpot=0.02, build_seconds=1.5, build_slows=4.0)
    with serve(behaviour) as server:
        out = tmp_path / "stall.json"
        done = loadtest(*STALL.split(), str(out), "--url", server.url)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert server.calls == ["int8:evict?model=m&delete=true", "int8:build?model=m"] * 2
    assert {body["model"] for body in server.bodies} == {"m@bf16"}
    # Four times slower by construction; noise may only blur that.
    assert 2 < report["median"]["p50_ratio"] < 6
    assert report["median"]["build_seconds"] == pytest.approx(1.5)
    assert all(run["before"]["gaps"] > 20 and run["during"]["gaps"] > 10 for run in report["runs"])
    assert "Time between tokens" in done.stdout


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Behaviour(tpot=0.01, build_ends_as="failed"), id="the build fails"),
        pytest.param(Behaviour(tpot=0.01, error_after=3), id="a stream fails"),
    ],
)
def test_a_measurement_that_failed_says_so(behaviour: Behaviour) -> None:
    with serve(behaviour) as server:
        done = loadtest(*STALL.split(), "-", "--url", server.url)
    assert done.returncode == 1
    assert "failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
