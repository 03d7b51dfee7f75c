from __future__ import annotations

import json
import math

import pytest

from loadtest.overhead import decision_times
from tests.loadtest.standin import Behaviour, serve
from tests.loadtest.test_cli import loadtest

COMMON = ("overhead", "--users", "4", "--requests", "20", "--max-tokens", "6", "--json", "-")


def test_what_is_above_the_nominal_times_is_added() -> None:
    with serve(Behaviour(ttft=0.15, tpot=0.03)) as server:
        done = loadtest(
            *COMMON, *("--url", server.url, "--nominal-ttft-ms", "50", "--nominal-tpot-ms", "10")
        )
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)["added"]
    assert 100 <= added["ttft_ms"]["p50"] < 350
    assert 19 <= added["tpot_ms"]["p50"] < 60


def test_a_baseline_is_subtracted_and_sees_the_same_requests() -> None:
    with serve(Behaviour(ttft=0.3)) as gateway, serve(Behaviour(ttft=0.05)) as behind:
        done = loadtest(*COMMON, "--url", gateway.url, "--baseline-url", behind.url)
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)["added"]
    assert 150 < added["ttft_ms"]["p50"] < 400
    prompts = [
        sorted(body["messages"][0]["content"] for body in s.bodies) for s in (gateway, behind)
    ]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 20


def test_failed_requests_are_not_passed_over() -> None:
    with serve(Behaviour(statuses=[500])) as server:
        done = loadtest(
            *COMMON, *("--url", server.url, "--nominal-ttft-ms", "0", "--nominal-tpot-ms", "0")
        )
    assert done.returncode == 1
    assert "failed requests: {'gateway': 1}" in done.stderr


def test_a_steady_rate_and_the_time_of_whole_answers() -> None:
    with serve(Behaviour(ttft=0.15, tpot=0.03)) as server:
        done = loadtest(
            *COMMON,
            *("--url", server.url, "--rate", "40"),
            *("--nominal-ttft-ms", "50", "--nominal-tpot-ms", "10"),
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 190 <= report["added"]["total_ms"]["p50"] < 600, "100 ms, and 5 times 20 ms"
    gaps = [b - a for a, b in zip(server.arrivals, server.arrivals[1:], strict=False)]
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(0.025, abs=0.02)
    assert report["decision_us"] is None, "this server tells nothing about decisions"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param({}, {}, None, id="a server without such a metric"),
        pytest.param({1e-5: 5, math.inf: 5}, {1e-5: 5, math.inf: 5}, None, id="nothing decided"),
        pytest.param(
            {1e-5: 9, 2e-5: 9, math.inf: 9},
            {1e-5: 9, 2e-5: 109, math.inf: 109},
            {"p50": 15.0, "p99": 19.9},
            id="inside a bucket, what was there before left out",
        ),
        pytest.param(
            {},
            {1e-5: 98, 2e-5: 98, math.inf: 100},
            {"p50": 10 * 50 / 98, "p99": 20.0},
            id="beyond the last bound",
        ),
    ],
)
def test_decision_times(
    before: dict[float, float], after: dict[float, float], expected: dict[str, float] | None
) -> None:
    times = decision_times(before, after)
    assert times == (None if expected is None else pytest.approx(expected))
