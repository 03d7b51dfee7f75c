from __future__ import annotations

import json

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
