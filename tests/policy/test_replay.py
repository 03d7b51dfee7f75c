"""Traces, the simulated ladder, and replays of policies on it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import InvalidRequest, NotFound
from gateway.policy.budget import Sla
from gateway.policy.policy import Policy
from gateway.policy.replay import replay
from gateway.policy.simulate import Job, Ladder
from gateway.policy.trace import Arrival, read_trace, scaled
from gateway.variants.variant import State
from tests.policy.ladders import CARDS, MB, ladder, with_level

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def poisson(count: int, per_second: float, seed: int = 0, sla: Sla | None = None) -> list[Arrival]:
    rng, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(per_second)
        tokens = rng.randint(1, 60)
        arrivals.append(Arrival(now, rng.randint(1, 300), tokens, sla or Sla()))
    return arrivals


class TestTrace:
    def test_the_azure_format(self, tmp_path: Path) -> None:
        path = tmp_path / "trace.csv"
        path.write_text(
            HEADER + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,0\n"
        )
        first, second = read_trace(path)
        assert (first.time_s, first.prompt_tokens, first.output_tokens) == (0.0, 4808, 1)
        assert second.time_s == pytest.approx(0.052, abs=1e-6)
        assert len(read_trace(path, limit=1)) == 1
        (half, _) = scaled(read_trace(path), time=0.5, length=0.5)
        assert half.prompt_tokens == 2404

    def test_plain_seconds_and_other_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "trace.csv"
        path.write_text("GeneratedTokens,who,TIMESTAMP,ContextTokens\n5,x,10.5,7\n6,y,12,8\n")
        assert read_trace(path)[1] == Arrival(1.5, 8, 6, at=12.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param("TIMESTAMP,Tokens\n", r":1: no column ContextTokens", id="columns"),
            pytest.param(HEADER, "holds no requests", id="empty"),
            pytest.param("", ":1: no column", id="no header"),
            pytest.param(HEADER + "1,2,3\nnow,2,3\n", ":3: TIMESTAMP: 'now'", id="time"),
            pytest.param(HEADER + "nan,2,3\n", ":2: TIMESTAMP", id="NaN"),
            pytest.param(HEADER + "1,x,3\n", ":2: ContextTokens: 'x'", id="count"),
            pytest.param(HEADER + "1,2,-3\n", ":2: GeneratedTokens: '-3'", id="negative"),
            pytest.param(HEADER + "1,2\n", ":2: GeneratedTokens", id="short line"),
            pytest.param(HEADER + "1,99999999999,3\n", ":2: ContextTokens", id="absurd"),
            pytest.param(HEADER + "0,2,3\n1e300,2,3\n", "TIMESTAMP: spans", id="eternity"),
        ],
    )
    def test_errors_name_the_line(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "trace.csv"
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            read_trace(path)

    @pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
    def test_unreadable_files(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "trace.csv"
        if kind == "folder":
            path.mkdir()
        elif kind == "binary":
            path.write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_trace(path)


class TestLadder:
    """bf16: 4000 prompt tokens/s, 10 ms a token alone, 20 ms a step for eight."""

    def run(self, ladder_: Ladder, jobs: list[tuple[float, str, Job]]) -> None:
        for time, level, job in jobs:
            ladder_.advance(time)
            ladder_.serve(level, job)
        ladder_.drain()

    def test_one_request_alone(self) -> None:
        job = Job(0.0, 400, 11)
        self.run(Ladder(ladder(), lambda *_: None), [(0.0, "bf16", job)])
        assert job.first == pytest.approx(0.1)
        assert job.done == pytest.approx(0.1 + 10 * 0.010)

    def test_prompts_wait_for_prompts(self) -> None:
        jobs = [Job(0.0, 400, 1) for _ in range(3)]
        self.run(Ladder(ladder(), lambda *_: None), [(0.0, "bf16", job) for job in jobs])
        assert [job.first for job in jobs] == pytest.approx([0.1, 0.2, 0.3])

    def test_levels_take_turns(self) -> None:
        """Both decode 100 tokens; 16 ms a turn until int8's 4 ms prefill lead is used up."""
        jobs = [Job(0.0, 1, 101), Job(0.0, 1, 101)]
        self.run(
            Ladder(ladder(), lambda *_: None), [(0.0, "bf16", jobs[0]), (0.0, "int8", jobs[1])]
        )
        assert jobs[0].done == pytest.approx(1.6, rel=0.01)
        assert jobs[1].done == pytest.approx(1.6, rel=0.01)

    def test_a_batch_decodes_together(self) -> None:
        jobs = [Job(0.0, 1, 101) for _ in range(8)]
        self.run(Ladder(ladder(), lambda *_: None), [(0.0, "bf16", job) for job in jobs])
        assert jobs[-1].done == pytest.approx(2.0, rel=0.02)

    def test_slots(self) -> None:
        jobs = [Job(0.0, 1, 11) for _ in range(3)]
        start = with_level(ladder(), "bf16", max_running=1)
        self.run(Ladder(start, lambda *_: None), [(0.0, "bf16", job) for job in jobs])
        assert [job.done for job in jobs] == pytest.approx([0.1, 0.2, 0.3], rel=0.02)

    def test_loads_and_builds_take_their_time(self) -> None:
        start = ladder({"int8": State.STORED, "int4": State.ABSENT, "sparse24": State.ABSENT})
        jobs = [Job(0.0, 1, 1), Job(0.0, 1, 1), Job(0.0, 1, 1)]
        levels = ("int8", "int4", "sparse24")
        self.run(
            Ladder(start, lambda *_: None),
            [(0.0, level, job) for level, job in zip(levels, jobs, strict=True)],
        )
        expected = [0.2, 20.2, 40.2]  # one build at a time
        assert [job.first for job in jobs] == pytest.approx(expected, abs=0.01)

    def test_a_new_level_takes_the_place_of_an_idle_one(self) -> None:
        start = ladder({"fp32": State.STORED}, memory_budget=120 * MB, memory_used=88 * MB)
        simulated = Ladder(start, lambda *_: None)
        simulated.serve("fp32", Job(0.0, 1, 1))
        simulated.drain()
        after = simulated.snapshot()
        assert after.memory_used <= after.memory_budget
        assert {f.level for f in after.levels if f.state is State.STORED} >= {"bf16"}

    def test_idle_levels_make_room_within_the_share_of_weights(self) -> None:
        """Memory is plentiful, but weights may take 90 MB of it: bf16 (34 MB) has to go."""
        start = ladder(
            {"fp32": State.STORED, "int8": State.ABSENT, "int4": State.ABSENT},
            memory_used=600 * MB,
            weight_budget=90 * MB,
            weight_used=56 * MB,
        )
        simulated = Ladder(start, lambda *_: None)
        simulated.serve("fp32", Job(0.0, 1, 1))
        simulated.drain()
        after = simulated.snapshot()
        loaded = [facts for facts in after.levels if facts.state is State.READY]
        assert "fp32" in [facts.level for facts in loaded]
        assert after.weight_used == sum(facts.card.resident_bytes for facts in loaded)
        assert after.weight_used <= after.weight_budget
        assert after.memory_used - start.memory_used == after.weight_used - start.weight_used

    @settings(max_examples=60)
    @given(
        st.lists(
            st.tuples(
                st.floats(0, 30),
                st.sampled_from(list(CARDS)),
                st.integers(1, 3000),
                st.integers(1, 300),
            ),
            max_size=40,
        ),
        st.dictionaries(st.sampled_from(list(CARDS)), st.sampled_from(State)),
    )
    def test_every_job_ends_once_after_it_came(
        self, work: list[tuple[float, str, int, int]], states: dict[str, State]
    ) -> None:
        states = {k: State.ABSENT if v is State.FAILED else v for k, v in states.items()}
        ended: list[Job] = []
        simulated = Ladder(ladder(states), lambda _, job: ended.append(job))
        jobs = []
        for at, level, prompt, output in sorted(work):
            simulated.advance(at)
            jobs.append(Job(at, prompt, output))
            simulated.serve(level, jobs[-1])
        simulated.drain()
        assert sorted(map(id, ended)) == sorted(map(id, jobs))
        for job in jobs:
            assert job.arrived < job.first <= job.done < math.inf
        final = simulated.snapshot()
        assert final.host_running == final.host_waiting_prompt_tokens == 0
        assert all(not facts.leases for facts in final.levels)


class TestReplay:
    def test_a_calm_host_keeps_every_promise(self) -> None:
        calm = [Arrival(2.0 * i, 100, 20) for i in range(50)]
        (report,) = replay(calm, [Policy(name="p", tpot_ms=7, confidence=0.5)], ladder())
        assert report.attainment == 1.0
        assert report.levels == {"int8": 1.0}
        assert report.mean_ppl_ratio == pytest.approx(1.001)
        assert report.ttft_ms["p50"] == pytest.approx(1000 / 30, abs=0.1)
        assert report.tpot_ms["p95"] == pytest.approx(6, abs=0.1)

    def test_overload_is_counted_against_the_policy(self) -> None:
        crowd = poisson(300, per_second=100)
        tight = Policy(name="tight", latency_ms=500, on_miss="reject")
        (report,) = replay(crowd, [tight], ladder())
        assert report.requests == 300
        assert report.served + sum(report.refusals.values()) == 300
        assert report.attainment < 0.7
        assert set(report.refusals) == {"busy"} or "unmet" in report.refusals

    def test_no_single_level_serves_a_mix_as_well_as_choosing_does(self) -> None:
        """Exact answers and fast ones, from one host: what the whole thing is for."""
        fast = poisson(100, 0.5, seed=1, sla=Sla(policy="fast"))
        exact = poisson(100, 0.5, seed=2, sla=Sla(policy="exact"))
        mix = sorted([*fast, *exact], key=lambda arrival: arrival.time_s)

        def attainment(levels: tuple[str, ...]) -> float:
            policies = [
                Policy(name="fast", latency_ms=500, levels=levels),
                Policy(name="exact", max_ppl_ratio=1.0, levels=levels),
            ]
            reports = replay(mix, policies, ladder())
            return sum(report.attainment * report.requests for report in reports) / len(mix)

        choosing = attainment(())
        assert choosing > 0.75
        for level in CARDS:
            assert choosing > attainment((level,)) + 0.1

    def test_a_missing_level_is_built_and_then_used(self) -> None:
        start = ladder({"int8": State.ABSENT, "int4": State.ABSENT, "sparse24": State.ABSENT})
        arrivals = [Arrival(1.0 * i, 100, 20) for i in range(60)]
        eager = Policy(name="p", tpot_ms=7, memory_mb=40, expected_requests=1000, confidence=0.5)
        (report,) = replay(arrivals, [eager], start)
        assert report.levels["int8"] > 0.5
        assert report.levels["bf16"] > 0.2
        assert report.missed == {"tpot_ms": round(60 * report.levels["bf16"])}

    def test_waiting_is_counted(self) -> None:
        start = ladder({"int4": State.ABSENT})
        arrivals = [Arrival(1.0 * i, 100, 20) for i in range(10)]
        policy = Policy(name="p", objective="memory", on_miss="wait")
        (report,) = replay(arrivals, [policy], start)
        assert report.waited == 10
        assert report.levels == {"int4": 1.0}
        assert report.ttft_ms["p50"] > 10_000

    def test_it_is_deterministic_and_plain(self) -> None:
        arrivals = poisson(200, per_second=8)
        policy = Policy(name="p", latency_ms=800)
        first, second = (replay(arrivals, [policy], ladder())[0].json() for _ in range(2))
        assert first == second
        assert json.loads(json.dumps(first)) == first

    def test_policies_by_name(self) -> None:
        arrivals = [Arrival(0.0, 10, 10, Sla(policy="b")), Arrival(1.0, 10, 10)]
        policies = [Policy(name="a"), Policy(name="b"), Policy(name="default")]
        assert [report.policy for report in replay(arrivals, policies, ladder())] == [
            "b",
            "default",
        ]
        with pytest.raises(NotFound, match="there are: a"):
            replay(arrivals, [Policy(name="a")], ladder())
