"""Old policies against new ones on recorded traffic, and the decision log as a trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InvalidRequest
from gateway.policy.budget import Sla
from gateway.policy.dryrun import compare, policy_of
from gateway.policy.hours import Hours
from gateway.policy.matching import Table
from gateway.policy.policy import DEFAULT, Match, Policy
from gateway.policy.replay import replay
from gateway.policy.trace import Arrival, read_trace, scaled
from tests.policy.ladders import ladder

LINE: dict[str, Any] = {
    "ts": 1_795_435_200.5,
    "prompt_tokens": 100,
    "generated_tokens": 20,
    "max_tokens": 64,
    "policy": "gold",
    "sla": {"ttft_ms": 300},
    "key": "team-a",
    "level": "int8",
    "pinned": "int4",
    "path": "/v1/completions",
    "model": "m",
    "anything": {"else": 1},
}


def log(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "decisions.jsonl"
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def table(*policies: Policy) -> Table:
    return Table({policy.name: policy for policy in (DEFAULT, *policies)})


class TestLog:
    def test_a_line_is_an_arrival(self, tmp_path: Path) -> None:
        later = LINE | {"ts": "2026-11-23T12:00:02Z", "sla": None, "level": None}
        first, second = read_trace(log(tmp_path, later, LINE))
        assert first == Arrival(
            0.0, 100, 20, Sla(ttft_ms=300), 64, 1_795_435_200.5, "team-a", "/v1/completions", "m",
            "gold", "int8", "int4",
        )  # fmt: skip
        assert (second.time_s, second.sla, second.level) == (1.5, Sla(), None)

    def test_little_is_needed(self, tmp_path: Path) -> None:
        (only,) = read_trace(log(tmp_path, {"ts": 5, "prompt_tokens": 0}, "   "))
        assert (only.prompt_tokens, only.output_tokens, only.policy) == (1, 1, None)

    def test_what_was_refused_is_as_long_as_it_might_have_been(self, tmp_path: Path) -> None:
        (only,) = read_trace(log(tmp_path, LINE | {"generated_tokens": 0}))
        assert only.output_tokens == 64

    def test_lengths_scale_together(self, tmp_path: Path) -> None:
        (only,) = scaled(read_trace(log(tmp_path, LINE)), length=0.5)
        assert (only.prompt_tokens, only.output_tokens, only.max_tokens) == (50, 10, 32)

    @pytest.mark.parametrize(
        ("line", "fault"),
        [
            ({"prompt_tokens": 1}, ":2: ts: Field required"),
            (LINE | {"ts": "soon"}, ":2: ts: "),
            (LINE | {"ts": float("inf")}, ":2: "),
            (LINE | {"prompt_tokens": -1}, ":2: prompt_tokens: .*greater"),
            (LINE | {"generated_tokens": 1e300}, ":2: generated_tokens"),
            (LINE | {"sla": {"ttft": 3}}, ":2: sla.ttft"),
            ("{oops", ":2: .*JSON"),
            ("[1]", ":2: "),
        ],
    )
    def test_errors_name_the_line_and_the_field(
        self, tmp_path: Path, line: Any, fault: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=fault):
            read_trace(log(tmp_path, LINE, line))


CALM = [Arrival(2.0 * i, 100, 20) for i in range(30)]
OLD = Policy(name="p", max_ppl_ratio=1.0005)
FASTER = Policy(name="p", tpot_ms=7)


class TestCompare:
    def test_which_requests_change_level_and_what_it_costs(self) -> None:
        found = compare(CALM, table(OLD), table(FASTER), ladder(), "p")
        ((was, now, count),) = found.moves
        assert (was, count) == ("bf16", 30)
        assert now in ("int8", "int4")
        assert [change.request for change in found.changes] == list(range(30))
        old, new = found.old.total, found.new.total
        assert new.attainment == old.attainment == 1.0
        assert (new.mean_ppl_ratio or 0) > (old.mean_ppl_ratio or 0)
        assert (new.compute_ms_per_token or 0) < (old.compute_ms_per_token or 0)
        assert (new.memory_mb_s_per_token or 0) < (old.memory_mb_s_per_token or 0)
        plain = found.json()
        assert json.loads(json.dumps(plain)) == plain
        assert plain["total"]["new"]["policy"] == "all"

    def test_the_same_policies_change_nothing(self) -> None:
        mix = [replace(one, at=one.time_s) for one in CALM]
        found = compare(mix, table(OLD), table(OLD), ladder(), None)
        assert found.changes == ()
        assert found.old.total == found.new.total

    def test_a_pinned_level_stays_pinned(self) -> None:
        pinned = [replace(one, pinned="sparse24") for one in CALM]
        found = compare(pinned, table(OLD), table(FASTER), ladder(), "p")
        assert found.changes == ()
        assert {outcome.level for outcome in found.new.outcomes} == {"sparse24"}

    def test_refusals_are_changes(self) -> None:
        tight = Policy(name="p", memory_mb=1, on_miss="reject")
        found = compare(CALM, table(OLD), table(tight), ladder(), "p")
        assert {change.new.level for change in found.changes} == {None}
        assert sum(found.new.total.refusals.values()) == 30
        assert found.new.total.compute_ms_per_token is None

    def test_a_policy_that_was_not_there_takes_over_what_matched(self) -> None:
        """Under the old ones its requests fell under `default`."""
        found = compare(CALM, table(), table(FASTER), ladder(), "p")
        assert [(name, bool(old), bool(new)) for name, old, new in found.policies()] == [
            ("default", True, False),
            ("p", False, True),
        ]

    def test_cost_per_token_is_the_cards(self) -> None:
        """int8: 3000 prompt tokens/s and 6 ms a token; 100 tokens in, 20 out."""
        (report,) = replay(CALM, [Policy(name="p", levels=("int8",))], ladder())
        work = 1000 * 100 / 3000 + 19 * 6
        assert report.compute_ms_per_token == pytest.approx(work / 20)
        memory = 20 + 0.12  # MB: weights, and 120 tokens of KV cache at 1 kB
        assert report.memory_mb_s_per_token == pytest.approx(memory * work / 1000 / 20, rel=0.01)

    def test_the_simulation_is_held_against_the_record(self) -> None:
        told = [replace(one, level="fp32" if i % 3 else "int8") for i, one in enumerate(CALM)]
        only = table(Policy(name="p", levels=("int8",)))
        assert compare(told, only, only, ladder(), "p").as_recorded == pytest.approx(1 / 3)
        assert compare(CALM, only, only, ladder(), "p").as_recorded is None

    def test_answers_shorter_than_asked_for_are_learned(self) -> None:
        """Predicted as 500 tokens, the first answers take too long; they get 20."""
        short = [replace(one, max_tokens=500) for one in CALM * 4]
        short = [replace(one, time_s=2.0 * i) for i, one in enumerate(short)]
        bound = Policy(name="p", latency_ms=600, objective="quality")
        found = compare(short, table(bound), table(bound), ladder(), "p")
        levels = [outcome.level for outcome in found.new.outcomes]
        assert levels[0] not in ("fp32", "bf16")
        assert levels[-1] in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"key": "team-a"}, "keyed", id="by key, whatever was recorded"),
        pytest.param({"policy": "headed"}, "headed", id="by header: as recorded"),
        pytest.param({"policy": "keyed"}, "default", id="by key: matched anew"),
        pytest.param({"policy": "gone"}, "default", id="a policy that is gone"),
        pytest.param({"sla": Sla(policy="keyed")}, "keyed", id="named"),
        pytest.param({"sla": Sla(policy="gone"), "key": "team-a"}, "keyed", id="named, but gone"),
        pytest.param({"at": 1_795_435_200.0}, "noon", id="by the hour it came"),
    ],
)
def test_the_policy_of_a_recorded_request(changes: dict[str, Any], expected: str) -> None:
    found = table(
        Policy(name="keyed", match=Match(api_key=("team-a",))),
        Policy(name="headed", match=Match(header={"x-tier": "gold"})),
        Policy(name="noon", match=Match(hours=Hours(start="12:00", end="13:00"))),
    )
    assert policy_of(replace(Arrival(0.0, 1, 1), **changes), found, "m").name == expected
