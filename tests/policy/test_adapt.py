"""When a running answer changes its level: tables, and properties of every change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.adapt import EVERY, MOST, Going, Outlook, allowed_ms
from gateway.policy.budget import Budget, Sla
from gateway.policy.decision import Ask
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.variant import State
from tests.policy.ladders import CARDS, ladder, with_level


def going(level: str = "int8", pace: float = 6.0, **more: Any) -> Going:
    """After 21 tokens, 80 to go, first token after 50 ms."""
    done = more.pop("done", 21)
    now = 50.0 + pace * (done - 1)
    base = Going(level, 100 + done, done, 80, first_ms=50.0, now_ms=now, pace_ms=pace)
    return replace(base, **more)


def chosen(
    answer: Going,
    states: dict[str, State] | None = None,
    policy: Policy | None = None,
    bearable_ms: float = math.inf,
    pin: str | None = None,
    **sla: Any,
) -> str | None:
    snapshot = ladder(states)
    ask = Ask("m", 100, 101, pin, Sla(**sla))
    said = Predictor().predict(answer.context, answer.left, snapshot)
    rules = policy or Policy(name="p", confidence=0.5, adaptive=True)
    return Outlook(ask, rules, snapshot, said, bearable_ms).next_level(answer)


@pytest.mark.parametrize(
    ("answer", "sla", "level"),
    [
        pytest.param(going("bf16", 10.0), {"tpot_ms": 10.5}, None, id="just right: stays"),
        pytest.param(
            going("bf16", 30.0), {"tpot_ms": 14}, "int8", id="danger: the best that keeps it"
        ),
        pytest.param(going("bf16", 30.0), {"tpot_ms": 10.5}, "int4", id="danger: only the fastest"),
        pytest.param(
            going("bf16", 22.0), {"tpot_ms": 14, "max_ppl_ratio": 1.0005}, None,
            id="danger: never below the quality floor",
        ),
        pytest.param(
            going("bf16", 30.0), {"tpot_ms": 10, "memory_mb": 25}, "int4", id="within the memory"
        ),
        pytest.param(going("bf16", 30.0), {"tpot_ms": 5}, None, id="lost: nothing saves it"),
        pytest.param(
            going("bf16", 30.0), {"latency_ms": 1400}, "int8", id="danger: the latency counts too"
        ),
        pytest.param(going("int8", 6.0), {"tpot_ms": 30}, "bf16", id="slack: a better level"),
        pytest.param(going("int8", 6.0), {}, "bf16", id="no bound on time: all the slack there is"),
        pytest.param(going("int8", 6.0), {"tpot_ms": 11}, None, id="too little slack"),
        pytest.param(
            going("int8", 6.0), {"tpot_ms": 30, "objective": "latency"}, None,
            id="slack is of no interest to who wants speed",
        ),
        pytest.param(
            going("int8", 6.0, left=EVERY - 1), {"tpot_ms": 30}, None, id="too near the end"
        ),
        pytest.param(going("int8", 6.0, moves=MOST), {"tpot_ms": 30}, None, id="often enough"),
    ],
)  # fmt: skip
def test_when_an_answer_moves(answer: Going, sla: dict[str, Any], level: str | None) -> None:
    assert chosen(answer, **sla) == level


def test_only_to_levels_that_are_in_memory_and_allowed() -> None:
    slow = going("bf16", 30.0)
    assert chosen(slow, {"int8": State.STORED}, tpot_ms=14) == "int4"
    assert chosen(slow, {"int8": State.DRAINING}, tpot_ms=14) == "int4"
    policy = Policy(name="p", confidence=0.5, levels=("bf16", "sparse24"), adaptive=True)
    assert chosen(slow, policy=policy, tpot_ms=14) == "sparse24"
    assert chosen(slow, pin="bf16", tpot_ms=14) is None


def test_a_better_level_must_not_break_anybody_elses_promise() -> None:
    assert chosen(going("int8", 6.0), bearable_ms=9.0) is None
    assert chosen(going("int8", 6.0), bearable_ms=11.0) == "bf16"


def test_other_levels_are_judged_by_the_promised_quantile() -> None:
    sla = {"tpot_ms": 11.0}
    sure = Policy(name="p", confidence=0.99, adaptive=True)
    slow = going("bf16", 14.0)
    assert chosen(slow, **sla) == "int8"
    assert chosen(slow, policy=sure, **sla) == "int4"


def test_what_is_allowed_per_token_keeps_the_bounds_exactly() -> None:
    answer = going("bf16", 30.0)  # 20 gaps took 600 ms, 80 tokens are left
    allowed = allowed_ms(answer, Budget(tpot_ms=14.0))
    assert (600.0 + 80 * allowed) / 100 == pytest.approx(14.0)
    allowed = allowed_ms(answer, Budget(latency_ms=2000.0))
    assert answer.now_ms + 80 * allowed == pytest.approx(2000.0)
    assert allowed_ms(answer, Budget(tpot_ms=14.0, latency_ms=2000.0)) == pytest.approx(10.0)
    assert allowed_ms(answer, Budget()) == math.inf


@given(
    answer=st.builds(
        going,
        st.sampled_from(sorted(CARDS)),
        st.floats(0.5, 100),
        done=st.integers(2, 60),
        left=st.integers(1, 200),
    ),
    sla=st.fixed_dictionaries(
        {
            "tpot_ms": st.one_of(st.none(), st.floats(1, 60)),
            "latency_ms": st.one_of(st.none(), st.floats(50, 20_000)),
            "max_ppl_ratio": st.one_of(st.none(), st.sampled_from([1.0, 1.0005, 1.01, 1.1, 2.0])),
            "memory_mb": st.one_of(st.none(), st.floats(10, 80)),
            "objective": st.sampled_from(["quality", "latency", "memory", "throughput"]),
        }
    ),
    asleep=st.sets(st.sampled_from(sorted(CARDS)), max_size=3),
)
def test_every_move_keeps_the_hard_bounds_and_is_for_a_reason(
    answer: Going, sla: dict[str, Any], asleep: set[str]
) -> None:
    level, pace, left = answer.level, answer.pace_ms, answer.left
    found = chosen(answer, dict.fromkeys(asleep - {level}, State.STORED), **sla)
    if found is None:
        return
    ratio, memory = sla["max_ppl_ratio"], sla["memory_mb"]
    assert found != level
    assert found not in asleep
    assert left >= EVERY
    card, here = CARDS[found], CARDS[level]
    assert ratio is None or card.perplexity_ratio <= ratio
    assert memory is None or card.resident_bytes / 1e6 <= memory
    allowed = allowed_ms(answer, Budget(tpot_ms=sla["tpot_ms"], latency_ms=sla["latency_ms"]))
    step = 1000 / card.decode_tokens_per_s["1"]
    if pace > allowed:
        assert allowed > 0
        assert step < pace
    else:
        assert sla["objective"] == "quality"
        assert card.loss < here.loss
        assert step <= allowed


def test_a_level_that_has_left_the_ladder_stays_where_it_is() -> None:
    assert chosen(going("gone", 30.0), tpot_ms=14) is None
    snapshot = with_level(ladder(), "int8", state=State.FAILED)
    said = Predictor().predict(100, 80, snapshot)
    outlook = Outlook(
        Ask("m", 100, 100, None, Sla(tpot_ms=14)), Policy(name="p", confidence=0.5), snapshot, said
    )
    assert outlook.next_level(going("bf16", 30.0)) == "int4"
