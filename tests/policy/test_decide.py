"""Decisions as tables: one row per rule of the tree in `gateway.policy.decide`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.policy.moment import Moment
from gateway.policy.policy import Policy
from gateway.variants.variant import LadderSnapshot, State
from tests.policy.ladders import CARDS, MB, busy, choose, ladder, with_level

ABSENT, STORED, BUILDING = State.ABSENT, State.STORED, State.BUILDING
ONLY_DENSE = {"int8": ABSENT, "int4": ABSENT, "sparse24": ABSENT}


@pytest.mark.parametrize(
    ("sla", "level"),
    [
        pytest.param({}, "bf16", id="quality: near-equal quality goes to the faster level"),
        pytest.param({"max_ppl_ratio": 1.0}, "fp32", id="strict quality: only the exact level"),
        pytest.param({"objective": "latency"}, "int4", id="latency: the fastest"),
        pytest.param(
            {"objective": "latency", "min_agreement": 0.9}, "int8", id="latency above a floor"
        ),
        pytest.param({"objective": "memory"}, "int4", id="memory: the smallest"),
        pytest.param(
            {"objective": "memory", "max_ppl_ratio": 1.01}, "int8", id="memory above a floor"
        ),
        pytest.param({"objective": "throughput"}, "int4", id="throughput: highest batch rate"),
        pytest.param({"tpot_ms": 7}, "int8", id="tight tpot: best quality that keeps it"),
        pytest.param({"tpot_ms": 5}, "int4", id="tighter tpot: lower quality"),
        pytest.param({"ttft_ms": 30}, "bf16", id="tight ttft: the best prefill"),
        pytest.param({"latency_ms": 650}, "int8", id="tight latency"),
        pytest.param({"memory_mb": 25}, "int8", id="tight memory, KV counted"),
        pytest.param({"memory_mb": 20.1}, "int4", id="weights fit, the request's KV does not"),
        pytest.param({"tpot_ms": 7, "memory_mb": 13}, "int4", id="two bounds"),
    ],
)
def test_a_ready_ladder_serves_the_best_level_that_fits(sla: dict[str, Any], level: str) -> None:
    decision = choose(ladder(), **sla)
    assert (decision.action, decision.level, decision.code) == ("serve", level, "fits")
    assert decision.misses == ()
    assert decision.build is None
    assert level in decision.reason


@pytest.mark.parametrize(
    ("policy", "sla", "level"),
    [
        pytest.param({"tpot_ms": 7}, {"tpot_ms": 100}, "int8", id="a request cannot loosen"),
        pytest.param({"tpot_ms": 100}, {"tpot_ms": 5}, "int4", id="a request can tighten"),
        pytest.param({"levels": ("int8", "int4")}, {}, "int8", id="only the policy's levels"),
        pytest.param({"objective": "memory"}, {}, "int4", id="the policy's objective"),
        pytest.param(
            {"objective": "memory"}, {"objective": "quality"}, "bf16", id="the request's objective"
        ),
    ],
)
def test_request_and_policy_combine(
    policy: dict[str, Any], sla: dict[str, Any], level: str
) -> None:
    assert choose(ladder(), Policy(name="p", confidence=0.5, **policy), **sla).level == level


@pytest.mark.parametrize(
    ("states", "policy", "sla", "expected"),
    [
        # (3) something fits
        pytest.param(
            ONLY_DENSE, {}, {}, ("serve", "bf16", None, "fits"), id="3: best is there, no build"
        ),
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory"},
            {},
            ("serve", "bf16", "int4", "fits"),
            id="3: serve what is there, build the better",
        ),
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory", "expected_requests": 1},
            {},
            ("serve", "bf16", None, "fits"),
            id="3: a build that does not pay is not started",
        ),
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory", "build": False},
            {},
            ("serve", "bf16", None, "fits"),
            id="3: the policy forbids builds",
        ),
        pytest.param(
            {**ONLY_DENSE, "int4": BUILDING},
            {"objective": "memory"},
            {},
            ("serve", "bf16", None, "fits"),
            id="3: a running build is not ordered again",
        ),
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory", "on_miss": "reject"},
            {},
            ("serve", "bf16", "int4", "fits"),
            id="3: reject does not refuse what can be kept",
        ),
        # (2) waiting for something better
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory", "on_miss": "wait"},
            {},
            ("wait", None, "int4", "waits"),
            id="2: wait for the better level",
        ),
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory", "on_miss": "wait"},
            {"ttft_ms": 5000},
            ("serve", "bf16", "int4", "fits"),
            id="2: but not when the wait breaks a promise",
        ),
        pytest.param(
            ONLY_DENSE,
            {"objective": "memory", "on_miss": "wait", "wait_ms": 10_000},
            {},
            ("serve", "bf16", "int4", "fits"),
            id="2: nor when the build takes longer than wait_ms",
        ),
        pytest.param(
            {"bf16": ABSENT},
            {"on_miss": "wait"},
            {"max_ppl_ratio": 1.0005},
            ("serve", "fp32", "bf16", "fits"),
            id="2: nor for a tie-break (equal quality, only faster)",
        ),
        # (4) nothing fits now, wait
        pytest.param(
            ONLY_DENSE,
            {"on_miss": "wait"},
            {"tpot_ms": 7},
            ("wait", None, "int8", "waits"),
            id="4: wait for the level that would fit",
        ),
        pytest.param(
            dict.fromkeys(CARDS, STORED),
            {"on_miss": "wait"},
            {"ttft_ms": 100},
            ("serve", "bf16", None, "cold"),
            id="4: a cold level is loaded",
        ),
        pytest.param(
            ONLY_DENSE,
            {"on_miss": "wait", "wait_ms": 10_000},
            {"tpot_ms": 7},
            ("reject", None, "int8", "building"),
            id="4: too long a build is a refusal with a date",
        ),
        # (5) nothing fits now, nearest
        pytest.param(
            ONLY_DENSE,
            {},
            {"tpot_ms": 7},
            ("serve", "bf16", "int8", "nearest"),
            id="5: nearest serves, the fitting one is built",
        ),
        pytest.param(
            ONLY_DENSE,
            {},
            {"tpot_ms": 1},
            ("serve", "bf16", None, "nearest"),
            id="5: nothing would fit: nothing is built",
        ),
        pytest.param(
            ONLY_DENSE,
            {"expected_requests": 0},
            {"tpot_ms": 7},
            ("serve", "bf16", None, "nearest"),
            id="5: no traffic, no build",
        ),
        # (6) no loadable level keeps the hard bounds
        pytest.param(
            ONLY_DENSE,
            {},
            {"memory_mb": 25},
            ("wait", None, "int8", "waits"),
            id="6: memory is never traded: wait for the build",
        ),
        pytest.param(
            {level: ABSENT for level in CARDS if level != "sparse24"},
            {},
            {"max_ppl_ratio": 1.1, "tpot_ms": 1},
            ("wait", None, "int4", "waits"),
            id="6: quality is never traded, even when no level keeps the times",
        ),
        pytest.param(
            ONLY_DENSE,
            {"wait_ms": 1000},
            {"memory_mb": 25},
            ("reject", None, "int8", "building"),
            id="6: unless it takes too long",
        ),
        # (7) reject
        pytest.param(
            ONLY_DENSE,
            {"on_miss": "reject"},
            {"tpot_ms": 7},
            ("reject", None, "int8", "building"),
            id="7a: refused until built",
        ),
        pytest.param(
            {**ONLY_DENSE, "int8": BUILDING},
            {"on_miss": "reject"},
            {"tpot_ms": 7},
            ("reject", None, None, "building"),
            id="7a: a running build is not ordered again",
        ),
        pytest.param(
            ONLY_DENSE,
            {"on_miss": "reject", "expected_requests": 1},
            {"tpot_ms": 7},
            ("reject", None, None, "unmet"),
            id="7c: a build that does not pay",
        ),
        pytest.param(
            {},
            {"on_miss": "reject"},
            {"tpot_ms": 1},
            ("reject", None, None, "unmet"),
            id="7c: nobody can",
        ),
        pytest.param(
            {},
            {"on_miss": "wait"},
            {"tpot_ms": 1},
            ("reject", None, None, "unmet"),
            id="7c: there is nothing to wait for",
        ),
        pytest.param(
            {},
            {},
            {"memory_mb": 1},
            ("reject", None, None, "unmet"),
            id="7c: nearest never breaks memory",
        ),
    ],
)
def test_misses(
    states: dict[str, State],
    policy: dict[str, Any],
    sla: dict[str, Any],
    expected: tuple[str, str | None, str | None, str],
) -> None:
    decision = choose(ladder(states), Policy(name="p", confidence=0.5, **policy), **sla)
    assert (decision.action, decision.level, decision.build, decision.code) == expected


@pytest.mark.parametrize(
    ("changes", "pin", "policy", "expected"),
    [
        pytest.param({}, "int4", {"max_ppl_ratio": 1.0}, ("serve", "int4", None), id="1b: exact"),
        pytest.param({"state": STORED}, "int4", {}, ("serve", "int4", None), id="1b: loads"),
        pytest.param({"state": ABSENT}, "int4", {}, ("wait", None, "int4"), id="1d: waits"),
        pytest.param(
            {"state": ABSENT},
            "int4",
            {"on_miss": "reject"},
            ("reject", None, "int4"),
            id="1d: rejects",
        ),
        pytest.param(
            {"state": ABSENT}, "int4", {"wait_ms": 5}, ("reject", None, "int4"), id="1d: too long"
        ),
        pytest.param(
            {"state": ABSENT}, "int4", {"build": False}, ("reject", None, None), id="1a: no builds"
        ),
        pytest.param(
            {"state": State.DRAINING}, "int4", {}, ("reject", None, None), id="1c: being unloaded"
        ),
        pytest.param(
            {"state": State.FAILED, "error": "disk full"},
            "int4",
            {},
            ("reject", None, None),
            id="1a: failed",
        ),
        pytest.param({}, "int4", {"levels": ("int8",)}, ("reject", None, None), id="1a: forbidden"),
        pytest.param({}, "int3", {}, ("reject", None, None), id="1a: unknown"),
    ],
)
def test_a_pinned_level_is_served_exactly_or_not_at_all(
    changes: dict[str, Any],
    pin: str,
    policy: dict[str, Any],
    expected: tuple[str, str | None, str | None],
) -> None:
    snapshot = with_level(ladder(), "int4", **changes)
    decision = choose(snapshot, Policy(name="p", confidence=0.5, **policy), pin=pin)
    assert (decision.action, decision.level, decision.build) == expected
    assert pin in decision.reason


def test_a_pinned_level_reports_the_bounds_it_breaks() -> None:
    decision = choose(ladder(), pin="int4", max_ppl_ratio=1.01, tpot_ms=1)
    assert decision.misses == ("tpot_ms", "max_ppl_ratio")
    assert "perplexity ratio 1.05" in decision.reason or "perplexity ratio 1.06" in decision.reason


def test_a_pinned_failure_says_why() -> None:
    snapshot = with_level(ladder(), "int4", state=State.FAILED, error="disk full")
    assert choose(snapshot, pin="int4").reason == "int4 failed: disk full."


def test_failed_levels_are_not_candidates() -> None:
    snapshot = with_level(ladder(), "int4", state=State.FAILED, error="disk full")
    decision = choose(snapshot, objective="memory")
    assert decision.level == "int8"
    assert {v.level: v.why for v in decision.verdicts}["int4"] == "failed: disk full"


class TestFailures:
    """A failure is the server's fault: whoever it keeps from an answer may come back."""

    def failed(self, **retries: float) -> LadderSnapshot:
        snapshot = ladder()
        for level, retry in retries.items():
            changes: dict[str, Any] = {
                "state": State.FAILED,
                "error": "disk full",
                "retry_s": retry,
            }
            snapshot = with_level(snapshot, level, **changes)
        return snapshot

    def test_a_pinned_level_is_tried_again(self) -> None:
        decision = choose(self.failed(int4=17.5), pin="int4")
        assert (decision.code, decision.retry_after_s) == ("failed", 17.5)

    def test_there_is_a_date_even_when_the_pool_gives_none(self) -> None:
        assert choose(self.failed(int4=0.0), pin="int4").retry_after_s == 1.0

    @pytest.mark.parametrize("on_miss", ["wait", "nearest", "reject"])
    @pytest.mark.parametrize("sla", [{}, {"tpot_ms": 1}, {"max_ppl_ratio": 1.1}])
    def test_when_only_failed_levels_remain_the_first_to_be_tried_again_sets_the_date(
        self, on_miss: str, sla: dict[str, Any]
    ) -> None:
        snapshot = self.failed(fp32=25, bf16=20, int8=9, int4=12, sparse24=30)
        decision = choose(snapshot, on_miss=on_miss, **sla)
        assert (decision.action, decision.code) == ("reject", "failed")
        assert decision.retry_after_s == 9
        assert "int8 failed: disk full" in decision.reason

    def test_levels_that_the_policy_leaves_out_do_not_remain(self) -> None:
        policy = Policy(name="p", confidence=0.5, levels=("int8", "int4"))
        assert choose(self.failed(int8=8, int4=5), policy).retry_after_s == 5

    @pytest.mark.parametrize("on_miss", ["wait", "nearest", "reject"])
    def test_when_only_failed_levels_keep_the_quality(self, on_miss: str) -> None:
        snapshot = self.failed(fp32=25, bf16=20, int8=9)
        decision = choose(snapshot, max_ppl_ratio=1.0005, on_miss=on_miss)
        assert (decision.code, decision.retry_after_s) == ("failed", 20)

    def test_a_failed_level_that_would_not_help_is_not_to_blame(self) -> None:
        decision = choose(self.failed(int4=5), max_ppl_ratio=1.01, tpot_ms=1, on_miss="reject")
        assert (decision.code, decision.retry_after_s) == ("unmet", None)

    def test_nearest_serves_what_is_there(self) -> None:
        assert choose(self.failed(int8=5), tpot_ms=7, max_ppl_ratio=1.01).code == "nearest"


def test_waiting_predicts_the_wait() -> None:
    decision = choose(ladder(ONLY_DENSE), tpot_ms=7, ttft_ms=300, on_miss="wait")
    assert decision.action == "wait"
    assert decision.predicted is not None
    assert decision.predicted.ttft_ms > 20_000  # the build
    assert decision.misses == ("ttft_ms",)
    assert decision.predicted.tpot_ms < 7


def test_a_build_waits_for_the_builds_before_it() -> None:
    alone = choose(ladder(ONLY_DENSE), pin="int4").predicted
    second = choose(ladder({**ONLY_DENSE, "int8": BUILDING}), pin="int4").predicted
    assert alone is not None
    assert second is not None
    assert second.ttft_ms - alone.ttft_ms == pytest.approx(20_000)


def test_loading_counts_in_the_time_to_first_token() -> None:
    """bf16 is the best, but loading it would break the bound; int8 is ready."""
    snapshot = ladder({"bf16": STORED, "fp32": STORED})
    assert choose(snapshot).level == "bf16"
    assert choose(snapshot, ttft_ms=150).level == "int8"


def test_a_stored_level_that_would_be_better_is_warmed() -> None:
    snapshot = ladder({"int4": STORED})
    decision = choose(snapshot, ttft_ms=150, objective="latency")
    assert (decision.level, decision.warm, decision.build) == ("int8", "int4", None)


class TestHostMemory:
    def full(self, leases: int) -> LadderSnapshot:
        """Everything is taken by fp32 and bf16; int8 (20 MB) is on disk."""
        snapshot = ladder({"int8": STORED, "int4": ABSENT, "sparse24": ABSENT})
        snapshot = with_level(snapshot, "fp32", leases=leases)
        snapshot = with_level(snapshot, "bf16", leases=leases)
        return LadderSnapshot("m", snapshot.levels, 110 * MB, 105 * MB)

    def test_idle_levels_make_room(self) -> None:
        assert choose(self.full(leases=0), tpot_ms=7).level == "int8"

    def test_levels_in_use_do_not(self) -> None:
        decision = choose(self.full(leases=1), tpot_ms=7, on_miss="reject")
        assert (decision.action, decision.code) == ("reject", "busy")
        assert "host_memory" in {v.level: v.misses for v in decision.verdicts}["int8"]

    def test_a_level_larger_than_the_host_is_never_used(self) -> None:
        snapshot = ladder(dict.fromkeys(CARDS, STORED), memory_budget=30 * MB, memory_used=0)
        assert choose(snapshot, max_ppl_ratio=1.0, on_miss="reject").code == "unmet"
        assert choose(snapshot, pin="fp32").code == "too_large"

    def shared(self, used: int, **more: Any) -> LadderSnapshot:
        """fp32 (68 MB) and int8 (20 MB) are on disk, bf16 (34 MB) serves; weights may take 60 MB
        of the 1000 MB of memory, the rest is kept for KV pools."""
        states = {"fp32": STORED, "int8": STORED, "int4": ABSENT, "sparse24": ABSENT}
        budgets: dict[str, Any] = {"weight_budget": 60 * MB, "weight_used": used * MB}
        return with_level(ladder(states, **budgets), "bf16", **more)

    def misses(self, snapshot: LadderSnapshot) -> dict[str, tuple[str, ...]]:
        return {v.level: v.misses for v in choose(snapshot).verdicts}

    def test_memory_kept_for_kv_pools_is_no_room_for_weights(self) -> None:
        """1000 MB of memory are nearly free, but a level above the weights' share never fits."""
        snapshot = self.shared(used=34)
        assert self.misses(snapshot)["fp32"] == ("too_large",)
        assert choose(snapshot, pin="fp32").code == "too_large"
        assert choose(snapshot, max_ppl_ratio=1.0, on_miss="reject").code == "unmet"

    def test_a_failed_level_above_the_share_of_weights_is_too_large(self) -> None:
        snapshot = with_level(self.shared(used=34), "fp32", state=State.FAILED, error="no memory")
        assert choose(snapshot, pin="fp32").code == "too_large"

    def test_kv_pools_take_no_room_from_weights(self) -> None:
        """The KV pools fill all the rest of the memory; 26 MB are left for weights."""
        snapshot = replace(self.shared(used=34, leases=1), memory_used=1000 * MB)
        assert self.misses(snapshot)["int8"] == ()

    def test_weights_of_this_model_in_use_are_a_barrier_for_now(self) -> None:
        others = 10  # MB of another model: 16 MB are free, 50 MB without bf16
        assert self.misses(self.shared(used=34 + others, leases=1))["int8"] == ("host_memory",)
        assert self.misses(self.shared(used=34 + others))["int8"] == ()

    def test_weights_of_other_models_are_a_barrier_for_now(self) -> None:
        """bf16 is idle, but 41 MB belong to other models."""
        assert self.misses(self.shared(used=34 + 41))["int8"] == ("host_memory",)

    def test_idle_levels_never_free_more_than_the_share_of_weights(self) -> None:
        """Cards may overstate what is in memory; fp32 still has no room."""
        assert self.misses(self.shared(used=1))["fp32"] == ("too_large",)


class TestLoad:
    def test_a_queue_at_one_level_sends_requests_to_another(self) -> None:
        assert choose(ladder(), ttft_ms=200).level == "bf16"
        queued = with_level(ladder(), "bf16", stats=busy(0, waiting=4, prompt=4000))
        assert choose(queued, ttft_ms=200).level == "fp32"
        assert choose(queued, ttft_ms=80).level == "int8"

    def test_joining_a_batch_beats_a_second_level_on_the_same_cores(self) -> None:
        """Levels take turns, so a second level pays for its own step and for the batch's."""
        crowded = with_level(ladder(host_running=12), "bf16", stats=busy(12))
        assert choose(ladder(), objective="latency").level == "int4"
        assert choose(crowded, objective="latency").level == "bf16"

    def test_refusal_for_load_says_when_to_come_back(self) -> None:
        loaded = ladder()
        for level in CARDS:
            loaded = with_level(loaded, level, stats=busy(4, prompt=20_000, remaining=400))
        decision = choose(loaded, ttft_ms=200, on_miss="reject")
        assert (decision.action, decision.code) == ("reject", "busy")
        assert decision.retry_after_s is not None
        assert decision.retry_after_s > 1

    def test_refusal_for_good_has_no_date_but_an_offer(self) -> None:
        decision = choose(ladder(), ttft_ms=3, max_ppl_ratio=1.05, on_miss="reject")
        assert decision.retry_after_s is None
        assert decision.could_meet is not None
        again = choose(ladder(), **decision.could_meet, on_miss="reject")
        assert (again.action, again.misses) == ("serve", ())


def test_an_estimated_card_is_used_and_said_so() -> None:
    snapshot = ladder()
    guess = CARDS["int4"].model_copy(update={"measured": False})
    decision = choose(with_level(snapshot, "int4", card=guess), objective="memory")
    assert decision.level == "int4"
    assert "estimated" in decision.reason
    assert {v.level for v in decision.verdicts if v.estimated} == {"int4"}


def test_an_empty_ladder_is_a_refusal() -> None:
    decision = choose(LadderSnapshot("m", (), 10, 0))
    assert (decision.action, decision.code, decision.could_meet) == ("reject", "unmet", None)


def test_reasons_read_as_sentences() -> None:
    """What a caller sees, in full, once."""
    assert choose(ladder(), tpot_ms=7).reason == (
        "int8 has the best quality of the 2 levels that keep the budget "
        "(perplexity ratio 1.001, first token 33.3 ms, then 6 ms a token)."
    )
    assert choose(ladder(ONLY_DENSE), tpot_ms=7).reason == (
        "No usable level keeps the budget; bf16 is nearest: time per token 10 is above 7 ms; "
        "int8 would be better once built (about 20.2 s)."
    )
    assert choose(ladder(), tpot_ms=1, on_miss="reject").reason == (
        "No level can keep the budget; int4 is nearest: time per token 4 is above 1 ms."
    )


class TestConfidence:
    """Bounds on times are judged by the quantile that the policy promises."""

    @pytest.mark.parametrize(
        ("confidence", "tpot_ms", "level"),
        [
            pytest.param(0.5, 6.5, "int8", id="by the mean"),
            pytest.param(0.9, 6.5, "int4", id="nine of ten: int8 may take longer"),
            pytest.param(0.9, 9.0, "int8", id="nine of ten, with room"),
            pytest.param(0.99, 9.0, "int4", id="ninety-nine of a hundred"),
        ],
    )
    def test_a_higher_share_needs_more_room(
        self, confidence: float, tpot_ms: float, level: str
    ) -> None:
        policy = Policy(name="p", confidence=confidence)
        decision = choose(ladder(), policy, tpot_ms=tpot_ms)
        assert (decision.level, decision.misses) == (level, ())
        assert decision.predicted is not None
        assert decision.predicted.tpot_ms == {"int8": 6, "int4": 4}[level]  # told is the mean

    def test_what_could_be_met_is_what_the_share_keeps(self) -> None:
        policy = Policy(name="p", confidence=0.9, on_miss="reject")
        offer = choose(ladder(), policy, tpot_ms=1).could_meet
        assert offer is not None
        assert offer["tpot_ms"] > 4
        assert choose(ladder(), policy, **offer).level == "int4"


class TestTheMoment:
    """What no ladder tells: how long it has waited, promises to others, what happened lately."""

    def test_waiting_uses_up_the_budget(self) -> None:
        """bf16 alone takes 25 ms to the first token, int4 100."""
        assert choose(ladder(), ttft_ms=150, objective="memory").level == "int4"
        late = Moment(waited_ms=100)
        decision = choose(ladder(), ttft_ms=150, objective="memory", moment=late)
        assert decision.level == "int8"
        assert decision.predicted is not None
        assert decision.predicted.ttft_ms < 50  # counted from the decision

    def test_an_offer_is_made_for_a_request_that_comes_now(self) -> None:
        late = Moment(waited_ms=1000)
        decision = choose(ladder(), ttft_ms=150, on_miss="reject", moment=late)
        assert decision.action == "reject"
        assert decision.could_meet == {"ttft_ms": 150}

    @pytest.mark.parametrize(
        ("moment", "level"),
        [
            pytest.param(Moment(), "bf16", id="nobody was promised anything"),
            pytest.param(Moment(token_ms=12), "bf16", id="the pace is kept"),
            pytest.param(Moment(token_ms=7), "int8", id="only a faster step keeps the pace"),
            pytest.param(Moment(slack_ms=30), "bf16", id="a prompt of 25 ms can be borne"),
            pytest.param(Moment(slack_ms=10), None, id="no prompt can be borne"),
            pytest.param(Moment(token_ms=3), None, id="no step is fast enough"),
        ],
    )
    def test_no_choice_breaks_the_promise_of_one_that_runs(
        self, moment: Moment, level: str | None
    ) -> None:
        decision = choose(ladder(), moment=moment)
        assert decision.level == level
        if level is None:
            assert (decision.action, decision.code) == ("reject", "busy")
            assert "promise" in decision.reason
            assert decision.retry_after_s is not None

    def test_nor_does_a_pinned_level(self) -> None:
        decision = choose(ladder(), pin="bf16", moment=Moment(token_ms=7))
        assert (decision.action, decision.code) == ("reject", "busy")
        assert choose(ladder(), pin="int8", moment=Moment(token_ms=7)).level == "int8"

    @pytest.mark.parametrize(
        ("expected", "build"),
        [
            pytest.param(None, "int4", id="as the policy says"),
            pytest.param(0.5, None, id="hardly anybody comes"),
            pytest.param(1000.0, "int4", id="many come"),
        ],
    )
    def test_a_build_has_to_pay_for_the_traffic_there_is(
        self, expected: float | None, build: str | None
    ) -> None:
        policy = Policy(name="p", objective="memory")
        moment = Moment(expected=expected)
        assert choose(ladder(ONLY_DENSE), policy, moment=moment).build == build

    @pytest.mark.parametrize(
        ("recent", "sla", "level", "code"),
        [
            pytest.param("int8", {}, "bf16", "fits", id="without bounds nothing is close"),
            pytest.param("int8", {"tpot_ms": 20}, "bf16", "fits", id="half the bound is spare"),
            pytest.param("int8", {"tpot_ms": 10.5}, "int8", "steady", id="5 % to spare: stay"),
            pytest.param("int4", {"tpot_ms": 10.5}, "int4", "steady", id="wherever it was"),
            pytest.param("bf16", {"tpot_ms": 10.5}, "bf16", "fits", id="at the best already"),
            pytest.param("bf16", {"tpot_ms": 9.5}, "int8", "fits", id="it fits no more: leave"),
            pytest.param("gone", {"tpot_ms": 10.5}, "bf16", "fits", id="no longer in the ladder"),
            pytest.param("int8", {"ttft_ms": 27}, "bf16", "fits", id="never where it breaks"),
        ],
    )
    def test_a_kind_of_request_stays_until_another_level_is_clearly_better(
        self, recent: str, sla: dict[str, Any], level: str, code: str
    ) -> None:
        decision = choose(ladder(), moment=Moment(recent=recent), **sla)
        assert (decision.level, decision.code) == (level, code)
        if code == "steady":
            assert "goes on serving" in decision.reason

    @pytest.mark.parametrize(("tpot", "level"), [(4.8, "int8"), (5.5, "int4")])
    def test_the_momentarily_quicker_is_not_followed(self, tpot: float, level: str) -> None:
        """int4 takes 496 ms for all of it; int8 33 ms and 99 times `tpot`."""
        rates = {"decode_tokens_per_s": {"1": 1000 / tpot}}
        close = with_level(ladder(), "int8", card=CARDS["int8"].model_copy(update=rates))
        assert choose(close, objective="latency").level == "int4"
        moment = Moment(recent="int8")
        assert choose(close, objective="latency", moment=moment).level == level

    def full(self, **more: Any) -> LadderSnapshot:
        """54 of 70 MB are taken; fp32 (68 MB) needs the place of the others."""
        states = {"fp32": STORED, "int4": ABSENT, "sparse24": ABSENT}
        return replace(ladder(states), memory_budget=70 * MB, memory_used=54 * MB, **more)

    def test_levels_do_not_take_turns_in_memory(self) -> None:
        sla = {"max_ppl_ratio": 1.0005, "objective": "quality"}
        better = with_level(
            self.full(),
            "bf16",
            card=CARDS["bf16"].model_copy(update={"perplexity_ratio": 1.0004, "kl_nats": 0.02}),
        )
        assert choose(better, **sla).level == "fp32"
        settling = Moment(settling=True)
        decision = choose(better, moment=settling, **sla)
        assert (decision.level, decision.code) == ("bf16", "steady")
        strict = choose(better, moment=settling, max_ppl_ratio=1.0)
        assert strict.level == "fp32"  # nothing in memory would do
