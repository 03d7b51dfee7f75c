"""A study of promises kept: what is judged, who is asked, and one small study for real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.client import Outcome
from loadtest.mix import BadInput
from loadtest.sla.cli import DEFAULT
from loadtest.sla.judge import judge, summarize
from loadtest.sla.play import Scene, window
from loadtest.sla.show import gather, interval, plot, tables
from loadtest.sla.study import Promise, Study, load_study
from loadtest.sla.systems import smallest, systems
from loadtest.workloads import Arrival, Planned, TextPrompts

STUDY = Study.model_validate(
    {
        "model": "fake",
        "path": "fake",
        "levels": ["bf16", "int8"],
        "memory_budget": "128MB",
        "traffic": {"seconds": 1.5, "warm_seconds": 0.2, "drain_seconds": 5, "rate": 20},
        "callers": [
            {"name": "quick", "weight": 1, "promise": {"ttft_ms": 5000, "max_ppl_ratio": 1.2}},
            {"name": "strict", "weight": 1, "promise": {"max_ppl_ratio": 1.0}},
        ],
        "ablations": {"no-build": {"policy": {"build": False}}},
    }
)


def card(**changed: Any) -> dict[str, Any]:
    return {
        "state": "ready",
        "resident_bytes": 10_000_000,
        "kv_bytes_per_token": 1000,
        "perplexity_ratio": 1.0,
        "top1_agreement": 1.0,
        "prefill_tokens_per_s": 1000.0,
        "decode_tokens_per_s": {"1": 100.0},
        **changed,
    }


CARDS = {
    "bf16": card(resident_bytes=40_000_000),
    "int8": card(resident_bytes=20_000_000, perplexity_ratio=1.25, top1_agreement=0.9),
}


def planned(name: str = "quick", *, tokens: int = 5) -> Planned:
    return Planned(0, 0.0, STUDY.caller(name).traffic, "words", 100, tokens)


def answered(level: str = "bf16", *, first: float = 0.1, step: float = 0.01) -> Outcome:
    times = [10.0 + first + step * index for index in range(5)]
    return Outcome(
        planned(), intended=10.0, sent=10.0, status="ok", finished=times[-1], token_times=times,
        prompt_tokens=100, completion_tokens=5, level=level,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("promise", "level", "broken"),
    [
        ({}, "int8", ()),
        ({"ttft_ms": 101}, "bf16", ()),
        ({"ttft_ms": 99}, "bf16", ("ttft_ms",)),
        ({"tpot_ms": 10.5, "latency_ms": 141}, "bf16", ()),
        ({"tpot_ms": 9.5, "latency_ms": 139}, "bf16", ("tpot_ms", "latency_ms")),
        ({"max_ppl_ratio": 1.2}, "bf16", ()),
        ({"max_ppl_ratio": 1.2}, "int8", ("max_ppl_ratio",)),
        ({"min_agreement": 0.95}, "int8", ("min_agreement",)),
        ({"memory_mb": 20.2}, "int8", ()),  # 20 MB of weights, 105 tokens of 1 kB
        ({"memory_mb": 20.1}, "int8", ("memory_mb",)),
    ],
)
def test_an_answer_is_kept_when_every_bound_holds(
    promise: dict[str, float], level: str, broken: tuple[str, ...]
) -> None:
    one = judge(answered(level), Promise(**promise), CARDS)
    assert one.broken == broken
    assert one.kept == (not broken)


def test_a_better_than_dense_answer_is_worth_no_more_than_dense() -> None:
    lucky = {"bf16": card(perplexity_ratio=0.8)}
    assert judge(answered(), Promise(), lucky).weight == 1.0
    assert judge(answered("int8"), Promise(), CARDS).weight == pytest.approx(1 / 1.25)
    assert judge(answered(), Promise(ttft_ms=1), CARDS).weight == 0.0


def test_an_unfinished_answer_keeps_nothing_and_a_level_nobody_knows_breaks_what_it_should() -> (
    None
):
    outcome = answered()
    outcome.status = "timeout"
    assert not judge(outcome, Promise(), CARDS).kept
    assert judge(answered("gone"), Promise(max_ppl_ratio=2), CARDS).broken == ("max_ppl_ratio",)


def test_refusals_count_against_attainment_but_not_of_the_admitted() -> None:
    refused = answered()
    refused.status = "refused"
    judged = [judge(one, Promise(), CARDS) for one in (answered(), answered(), refused)]
    found = summarize(STUDY, judged, 5e6)
    assert found["attainment"] == pytest.approx(2 / 3)
    assert found["attainment_of_admitted"] == 1.0
    assert found["goodput_per_s"] == pytest.approx(2 / 1.3)
    assert found["memory_peak_mb"] == 5.0


@pytest.mark.parametrize(
    ("promise", "level"),
    [
        ({}, "int8"),  # the smallest
        ({"max_ppl_ratio": 1.1}, "bf16"),
        ({"memory_mb": 30}, "int8"),
        ({"max_ppl_ratio": 1.1, "memory_mb": 30, "ttft_ms": 1}, "bf16"),  # as many misses: quicker
    ],
)
def test_greedy_takes_the_smallest_static_fit(promise: dict[str, float], level: str) -> None:
    cards = {**CARDS, "gone": card(state="failed", resident_bytes=1)}
    cards["bf16"] = cards["bf16"] | {"decode_tokens_per_s": {"1": 101.0}}
    assert smallest(Promise(**promise), planned(), cards) == level


def test_every_system_gets_the_same_requests() -> None:
    rng = np.random.default_rng(5)
    rows = [
        Arrival(at=float(at), prompt_tokens=int(rng.integers(10, 4000)), max_tokens=200)
        for at in np.cumsum(rng.exponential(0.3, size=500))
    ]
    prompts = TextPrompts.from_words(rng)
    scene = Scene(STUDY, rows, Path())
    one, again, other = (
        window(scene, 3, prompts),
        window(scene, 3, prompts),
        window(scene, 4, prompts),
    )
    assert one == again
    assert one != other
    assert len(one) == STUDY.traffic.rate * STUDY.traffic.seconds
    assert one[0].at == 0.0
    assert one[-1].at == pytest.approx(STUDY.traffic.seconds)
    assert max(p.prompt_tokens for p in one) <= STUDY.traffic.max_prompt
    assert {p.max_tokens for p in one} == {30}


def test_the_systems_differ_in_who_chooses_only() -> None:
    found = {system.name: system for system in systems(STUDY)}
    assert list(found) == ["fixed bf16", "fixed int8", "greedy", "pressgate", "no-build"]
    assert len({system.settings["memory_budget"] for system in found.values()}) == 1
    ask = planned("strict")
    assert found["fixed int8"].address(ask, CARDS).traffic.model == "fake@int8"
    assert found["fixed int8"].address(ask, CARDS).traffic.sla is None
    assert found["greedy"].address(ask, CARDS).traffic.model == "fake@bf16"
    assert found["pressgate"].address(ask, CARDS).traffic.sla == {"policy": "strict"}
    policies = found["pressgate"].settings["policies"]
    assert policies[1] == {"name": "strict", "max_ppl_ratio": 1.0}
    assert all(p["build"] is False for p in found["no-build"].settings["policies"])


def test_intervals_are_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["half"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert interval([2.0]) == {"mean": 2.0, "half": None}


def test_ratios_are_paired_by_seed() -> None:
    def run(system: str, kind: str, seed: int, worth: float) -> dict[str, Any]:
        row = summarize(STUDY, [judge(answered(), Promise(), CARDS)], 1.0)
        return row | {
            "system": system, "kind": kind, "seed": seed, "quality_goodput_per_s": worth,
        }  # fmt: skip

    runs = [
        run(name, kind, seed, worth * (seed + 1))
        for name, kind, worth in (
            ("fixed bf16", "fixed", 1.0),
            ("fixed int8", "fixed", 2.0),
            ("pressgate", "pressgate", 3.0),
        )
        for seed in range(3)
    ]
    report = gather(runs)
    assert report["best_fixed"] == "fixed int8"
    assert report["ratios"]["fixed int8"] == pytest.approx({"mean": 1.5, "half": 0.0})
    assert "**fixed int8** (best fixed)" in tables(report)[0]


def test_the_study_that_comes_with_the_package_is_valid() -> None:
    study = load_study(DEFAULT)
    assert {caller.name for caller in study.callers} == {
        "tight-latency", "strict-quality", "small-memory", "best-effort",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("levels: [bf16]", "levels"),
        ("levels: [a, b]\ncallers: []", "callers"),
        ("levels: [a, b]\nabsent: [c]\ncallers: [{name: x}]", "absent"),
        ("levels: [a, b]\ncallers: [{name: x, promise: {ttft: 1}}]", "callers.0.promise.ttft"),
        ("{", "not valid YAML"),
    ],
)
def test_a_bad_study_is_refused_by_name(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=word):
        load_study(file)


def test_a_small_study_end_to_end(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2026-01-01 00:00:{i / 10:09.6f},60,20\n" for i in range(400))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    study, png = tmp_path / "study.yaml", tmp_path / "study.png"
    study.write_text(yaml.safe_dump(STUDY.model_dump(mode="json", exclude_none=True)))
    arguments = ["sla", "--trace", trace, "--study", study, "--seeds", "1", "--png", png]
    arguments += ["--cache", tmp_path / "cache", "--json", tmp_path / "out.json"]
    arguments += ["--only", "fixed bf16,fixed int8,pressgate"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    worth = report["systems"]
    assert worth["fixed bf16"]["attainment"]["mean"] == 1.0
    assert worth["fixed int8"]["callers"]["strict"]["mean"] == 0.0  # int8 is worse than dense
    assert worth["fixed int8"]["callers"]["quick"]["mean"] == 1.0
    assert worth["pressgate"]["attainment"]["mean"] == 1.0
    assert report["best_fixed"] == "fixed bf16"
    assert png.read_bytes().startswith(b"\x89PNG")
    plot(report, png)
