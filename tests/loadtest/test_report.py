from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client import Outcome
from loadtest.mix import Goals, TrafficClass
from loadtest.report import is_good, missed_goals, record, spread, summarize
from loadtest.runner import Run
from loadtest.workloads import Planned

CLASSES = (
    TrafficClass(name="tight", goals=Goals(ttft_ms=100, tpot_ms=20, latency_ms=1000)),
    TrafficClass(name="total", goals=Goals(latency_ms=400)),
    TrafficClass(name="free"),
)


def outcome(
    traffic: TrafficClass = CLASSES[0],
    status: Any = "ok",
    ttft: float = 0.05,
    gaps: tuple[float, ...] = (0.01, 0.01),
    **fields: Any,
) -> Outcome:
    """An outcome that was meant to leave at 10.0 and left 5 ms late."""
    times: list[float] = []
    if status == "ok":
        times = [10.0 + ttft]
        for gap in gaps:
            times.append(times[-1] + gap)
    finished = times[-1] if times else 10.2
    index = fields.pop("index", 0)
    planned = Planned(index, None, traffic, "p", 4, 8)
    return Outcome(planned, 10.0, 10.005, status, finished, times, http_status=200, **fields)


@pytest.mark.parametrize(
    ("made", "missed"),
    [
        pytest.param(outcome(), (), id="all kept"),
        pytest.param(outcome(ttft=0.11), ("ttft_ms",), id="first token late"),
        pytest.param(outcome(gaps=(0.01, 0.04)), ("tpot_ms",), id="slow stream"),
        pytest.param(outcome(gaps=(0.95,)), ("tpot_ms",), id="stream slow, end in time"),
        pytest.param(outcome(gaps=(1.2,)), ("tpot_ms", "latency_ms"), id="two missed"),
        pytest.param(outcome(gaps=()), (), id="one token has no tpot"),
        pytest.param(outcome(CLASSES[2], ttft=99.0), (), id="no goals"),
    ],
)
def test_goals_missed(made: Outcome, missed: tuple[str, ...]) -> None:
    assert missed_goals(made) == missed
    assert is_good(made) == (not missed)


@pytest.mark.parametrize("status", ["refused", "error", "timeout"])
def test_only_an_answer_can_be_good(status: str) -> None:
    assert not is_good(outcome(CLASSES[2], status=status))


def test_an_answer_without_text_misses_a_first_token_goal() -> None:
    silent = outcome()
    silent.token_times = []
    assert missed_goals(silent) == ("ttft_ms",)


_MADE = st.builds(
    outcome,
    traffic=st.sampled_from(CLASSES),
    status=st.sampled_from(["ok", "ok", "ok", "refused", "error", "timeout"]),
    ttft=st.floats(0.006, 0.3),
    gaps=st.lists(st.floats(0.001, 0.2), max_size=6).map(tuple),
    level=st.sampled_from(["bf16", "int8", None]),
)


@given(st.lists(_MADE, min_size=1, max_size=40), st.floats(0.5, 100))
def test_goodput_and_attainment_agree_with_a_count_by_hand(
    outcomes: list[Outcome], elapsed: float
) -> None:
    report = summarize(Run(tuple(outcomes), elapsed, 0.0))
    good: dict[str, int] = {}
    for made in outcomes:
        goals, kept = made.planned.traffic.goals, made.status == "ok"
        if kept:
            first, last = made.token_times[0] - 10.0, made.token_times[-1] - 10.0
            count = len(made.token_times)
            kept = goals.ttft_ms is None or first * 1000 <= goals.ttft_ms
            kept &= goals.latency_ms is None or last * 1000 <= goals.latency_ms
            if goals.tpot_ms is not None and count > 1:
                kept &= (last - first) / (count - 1) * 1000 <= goals.tpot_ms * (1 + 1e-9)
        good[made.planned.traffic.name] = good.get(made.planned.traffic.name, 0) + kept
    total = sum(good.values())
    assert report["total"]["good"] == total
    assert report["total"]["goodput_per_s"] == pytest.approx(total / elapsed)
    assert report["total"]["attainment"] == pytest.approx(total / len(outcomes))
    assert {name: part["good"] for name, part in report["classes"].items()} == good
    refused = sum(made.status == "refused" for made in outcomes)
    assert report["total"]["refused"] == refused
    for part in ("classes", "levels"):
        assert sum(group["requests"] for group in report[part].values()) == len(outcomes)
    json.dumps(report, allow_nan=False)


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=200))
def test_percentiles_agree_with_the_standard_library(seconds: list[float]) -> None:
    measured = spread(seconds)
    assert measured is not None
    cuts = statistics.quantiles([1000 * s for s in seconds], n=100, method="inclusive")
    for percentile in (50, 90, 95, 99):
        assert measured[f"p{percentile}"] == pytest.approx(cuts[percentile - 1], abs=1e-6)
    assert measured["max"] == pytest.approx(1000 * max(seconds))


def test_nothing_measured_has_no_spread() -> None:
    assert spread([None, None]) is None


def test_throughput_counts_tokens_of_the_servers_usage() -> None:
    made = [outcome(completion_tokens=7, prompt_tokens=11), outcome(completion_tokens=3)]
    total = summarize(Run(tuple(made), 2.0, 0.0))["total"]
    assert total["output_tokens_per_s"] == 5.0
    assert total["requests_per_s"] == 1.0
    assert total["prompt_tokens"] == 11


def test_prediction_error_is_taken_from_what_the_client_measured() -> None:
    # From the send at 10.005: 45 ms to the first token, 10 ms per token, 65 ms in all.
    says = {"predicted": {"ttft_ms": 90.0, "tpot_ms": 5.0, "latency_ms": 65.0}}
    made = [outcome(compression=says), outcome(status="refused"), outcome()]
    errors = summarize(Run(tuple(made), 1.0, 0.0))["prediction_error"]
    assert {name: error["count"] for name, error in errors.items()} == {
        "ttft_ms": 1,
        "tpot_ms": 1,
        "latency_ms": 1,
    }
    assert errors["ttft_ms"]["mape"] == pytest.approx(1.0)
    assert errors["ttft_ms"]["bias"] == pytest.approx(2.0)
    assert errors["tpot_ms"]["mape"] == pytest.approx(0.5)
    assert errors["latency_ms"]["median_ape"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("compression", [None, {}, {"predicted": None}, {"predicted": {}}])
def test_no_predictions_no_prediction_error(compression: dict[str, Any] | None) -> None:
    made = outcome(compression=compression)
    assert summarize(Run((made,), 1.0, 0.0))["prediction_error"] == {}


def test_an_empty_run_has_a_report() -> None:
    report = summarize(Run((), 0.0, 0.0))
    assert report["total"]["requests"] == 0
    assert report["total"]["attainment"] is None


def test_a_record_holds_what_is_needed_to_compute_everything_again() -> None:
    made = outcome(completion_tokens=3, index=4)
    line = json.loads(json.dumps(record(made, origin=10.0)))
    assert line["token_times_s"] == pytest.approx([0.05, 0.06, 0.07])
    assert (line["index"], line["class"], line["good"]) == (4, "tight", True)
    assert line["sent_s"] == pytest.approx(0.005)
