from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.mix import BadInput, Goals, Lengths, Mix, TrafficClass, single_class
from loadtest.workloads import (
    Arrival,
    DefaultLengths,
    TextPrompts,
    TraceScale,
    closed,
    constant,
    plan,
    poisson,
    trace,
)

LENGTHS = DefaultLengths(prompt=Lengths(low=10, high=20), output=Lengths(low=5, high=5))
TEXT = " ".join(f"word{i:04d}" for i in range(3000))


def test_poisson_has_the_mean_and_the_variance_of_a_poisson_process() -> None:
    rate, duration = 50.0, 400.0
    times = np.array([a.at for a in poisson(rate, duration, 10**5, np.random.default_rng(1))])
    assert (np.diff(times) > 0).all()
    # Counts per second: mean and variance are both `rate`; five standard errors of room.
    counts = np.bincount(times.astype(int), minlength=int(duration))
    assert abs(counts.mean() - rate) < 5 * np.sqrt(rate / duration)
    assert abs(counts.var() / counts.mean() - 1) < 5 * np.sqrt(2 / duration)
    # Gaps are exponential: their standard deviation equals their mean, not half or twice it.
    gaps = np.diff(times)
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05


@given(rate=st.floats(0.1, 1000), duration=st.floats(0.1, 60), requests=st.integers(1, 500))
def test_open_loop_arrivals_keep_both_bounds(rate: float, duration: float, requests: int) -> None:
    for arrivals in (
        poisson(rate, duration, requests, np.random.default_rng(0)),
        constant(rate, duration, requests),
    ):
        assert len(arrivals) <= requests
        assert all(a.at is not None and 0 <= a.at < duration for a in arrivals)


def test_constant_gaps_are_even() -> None:
    assert [a.at for a in constant(4.0, 1.0, 100)] == [0.0, 0.25, 0.5, 0.75]


def test_closed_loop_has_no_moments() -> None:
    assert closed(3) == [Arrival(at=None)] * 3


def _write_trace(path: Path, rows: list[tuple[float, int, int]]) -> Path:
    start = datetime(2023, 11, 16, 18, 15, 46, 680590)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for offset, context, output in rows:
        stamp = (start + timedelta(seconds=offset)).strftime("%Y-%m-%d %H:%M:%S.%f")
        lines.append(f"{stamp}0,{context},{output}")  # Azure writes seven decimals
    path.write_text("\n".join(lines) + "\n")
    return path


def test_trace_scales_time_and_lengths(tmp_path: Path) -> None:
    path = _write_trace(tmp_path / "t.csv", [(0, 400, 44), (4.5, 3000, 2), (10, 20, 1000)])
    scale = TraceScale(time=2.0, length=0.1, max_prompt=250, max_output=60)
    arrivals = trace(path, scale, duration=60, requests=100)
    assert [a.at for a in arrivals] == pytest.approx([0.0, 2.25, 5.0])
    assert [a.prompt_tokens for a in arrivals] == [40, 250, 2]
    assert [a.max_tokens for a in arrivals] == [4, 1, 60]  # never below one token


def test_trace_is_sorted_and_bounded(tmp_path: Path) -> None:
    path = _write_trace(tmp_path / "t.csv", [(5, 5, 5), (0, 1, 1), (100, 9, 9)])
    assert [a.prompt_tokens for a in trace(path, TraceScale(), 50, 100)] == [1, 5]
    assert len(trace(path, TraceScale(), 500, 2)) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("a,b\n1,2\n", "no column TIMESTAMP", id="columns"),
        pytest.param("", "no column", id="empty"),
        pytest.param("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows", id="no rows"),
        pytest.param(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,1,1\nnow,2,2\n",
            "line 3",
            id="bad time",
        ),
        pytest.param(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,many,1\n",
            "line 2",
            id="bad number",
        ),
        pytest.param(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,5\n",
            "line 2",
            id="short row",
        ),
    ],
)
def test_a_broken_trace_is_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(BadInput, match="--trace") as caught:
        trace(path, TraceScale(), 10, 10)
    assert says in str(caught.value)


def test_a_binary_or_missing_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x00")
    for path in (tmp_path / "t.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(BadInput, match="--trace"):
            trace(path, TraceScale(), 10, 10)


@given(
    tokens=st.integers(1, 5000),
    tokens_per_char=st.floats(0.1, 1.0),
    overhead=st.floats(0, 30),
    seed=st.integers(0, 100),
)
def test_prompts_have_the_size_asked_for(
    tokens: int, tokens_per_char: float, overhead: float, seed: int
) -> None:
    source = TextPrompts(TEXT, tokens_per_char=tokens_per_char, overhead=overhead)
    text = source.prompt(tokens, np.random.default_rng(seed))
    wanted = max(1.0, (tokens - overhead) / tokens_per_char)
    assert text
    assert abs(len(text) - wanted) <= 2  # a space at either end may fall away


def test_prompts_start_at_different_words() -> None:
    rng = np.random.default_rng(0)
    starts = {TextPrompts(TEXT).prompt(8, rng)[:8] for _ in range(50)}
    assert len(starts) > 40
    assert all(start.startswith("word") for start in starts)


def test_prompts_from_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(b"\xff" * 1000)
    for name in ("short.txt", "binary.txt", "missing.txt"):
        with pytest.raises(BadInput, match="--prompts"):
            TextPrompts.from_file(tmp_path / name)


MIX = Mix(
    classes=(
        TrafficClass(name="a", weight=3, prompt_tokens=Lengths(low=50, high=60)),
        TrafficClass(name="b", weight=1, max_tokens=Lengths(low=9, high=9)),
    )
)


def _plan(arrivals: list[Arrival], mix: Mix, seed: int) -> list[tuple[str, str, int, int]]:
    planned = plan(arrivals, mix, TextPrompts(TEXT), LENGTHS, np.random.default_rng(seed))
    return [(p.traffic.name, p.prompt, p.prompt_tokens, p.max_tokens) for p in planned]


def test_a_plan_is_reproducible_from_its_seed() -> None:
    arrivals = closed(50)
    assert _plan(arrivals, MIX, 7) == _plan(arrivals, MIX, 7)
    assert _plan(arrivals, MIX, 7) != _plan(arrivals, MIX, 8)


def test_classes_come_in_their_shares_with_their_lengths() -> None:
    planned = _plan(closed(4000), MIX, 0)
    a = [item for item in planned if item[0] == "a"]
    assert abs(len(a) / 4000 - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)
    assert {item[2] for item in a} == set(range(50, 61))
    assert {item[3] for item in a} == {5}
    b = [item for item in planned if item[0] == "b"]
    assert {item[2] for item in b} == set(range(10, 21))
    assert {item[3] for item in b} == {9}


def test_a_class_overrules_the_trace_and_the_trace_the_defaults() -> None:
    arrivals = [Arrival(at=0.0, prompt_tokens=33, max_tokens=44)]
    only_b = Mix(classes=MIX.classes[1:])
    assert _plan(arrivals, only_b, 0)[0][2:] == (33, 9)
    assert _plan(arrivals, single_class(Goals()), 0)[0][2:] == (33, 44)
