"""The predictor: what it says before it has seen anything, and what it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.base import EngineStats
from gateway.policy.prediction import Prediction
from gateway.policy.predictor import Predictor
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, State
from tests.policy.ladders import CARDS, busy, ladder, with_level

anything = st.floats(allow_nan=True, allow_infinity=True)


def predict(
    predictor: Predictor, level: str = "bf16", snapshot: LadderSnapshot | None = None
) -> Prediction:
    snapshot = snapshot or ladder()
    index = [facts.level for facts in snapshot.levels].index(level)
    return predictor.predict(400, 100, snapshot)[index]


def test_on_an_idle_host_the_card_is_the_prediction() -> None:
    said = predict(Predictor())
    assert said.ttft_ms == pytest.approx(100)  # 400 tokens at 4000/s
    assert said.tpot_ms == pytest.approx(10)
    assert said.latency_ms == pytest.approx(100 + 99 * 10)
    assert said.memory_mb == pytest.approx(34 + 0.5)  # weights + 500 tokens of 1 kB


def test_a_tiny_prompt_costs_a_step() -> None:
    assert Predictor().predict(1, 1, ladder())[1].ttft_ms == pytest.approx(10)


@pytest.mark.parametrize(
    ("snapshot", "ttft_ms", "tpot_ms"),
    [
        pytest.param(
            with_level(ladder(), "bf16", state=State.STORED), 300, 10, id="a load comes first"
        ),
        pytest.param(
            with_level(ladder(), "bf16", stats=busy(7)), 100 + 2 * (10 * 13 / 7), 20, id="a batch"
        ),
        pytest.param(
            with_level(ladder(), "bf16", stats=busy(0, 1, prompt=800)),
            300,
            10 * 8 / 7,
            id="a prompt before it",
        ),
        pytest.param(
            with_level(ladder(), "int8", stats=busy(1)), 100 + 2 * 6, 16, id="another level decodes"
        ),
        pytest.param(
            with_level(ladder(), "int8", stats=busy(0, 1, prompt=150)),
            150,
            16,
            id="another level prefills 50 ms",
        ),
        pytest.param(
            with_level(ladder(), "int8", stats=busy(0, 1, prompt=10**6)),
            200,
            16,
            id="another level prefills for long: the cores are shared",
        ),
        pytest.param(ladder(host_running=1), 120, 20, id="another model decodes"),
        pytest.param(
            with_level(ladder(), "bf16", stats=busy(2, 1, remaining=300), max_running=2),
            100 + 2 * (10 * 8 / 7) + 2 * 100 * (10 * 8 / 7) / 2,
            10 * 8 / 7,
            id="all slots are taken",
        ),
    ],
)
def test_the_present_load_is_counted(
    snapshot: LadderSnapshot, ttft_ms: float, tpot_ms: float
) -> None:
    said = predict(Predictor(), snapshot=snapshot)
    assert said.ttft_ms == pytest.approx(ttft_ms)
    assert said.tpot_ms == pytest.approx(tpot_ms)


def test_it_learns_a_machine_twice_as_slow_within_twenty_answers() -> None:
    predictor = Predictor()
    for _ in range(20):
        said = predict(predictor)
        predictor.observe("m", "bf16", said, ttft_ms=200, tpot_ms=20)
    said = predict(predictor)
    assert said.ttft_ms == pytest.approx(200, rel=0.02)
    assert said.tpot_ms == pytest.approx(20, rel=0.02)
    for _ in range(60):
        predictor.observe("m", "bf16", predict(predictor), ttft_ms=200, tpot_ms=20)
        predictor.observe("m", "int8", predict(predictor, "int8"), tpot_ms=6)
    assert predict(predictor, "int8").tpot_ms == pytest.approx(6, rel=0.05)
    assert predict(predictor).tpot_ms == pytest.approx(20, rel=0.05), "levels learn for themselves"


def test_it_follows_a_machine_that_changes() -> None:
    predictor = Predictor()
    for slowdown in (1.0, 3.0, 0.5):
        for _ in range(30):
            predictor.observe("m", "bf16", predict(predictor), tpot_ms=10 * slowdown)
        assert predict(predictor).tpot_ms == pytest.approx(10 * slowdown, rel=0.02)


def test_many_requests_in_flight_do_not_make_it_overshoot() -> None:
    """All sixteen were predicted before the first answer came back."""
    predictor = Predictor()
    said = [predict(predictor) for _ in range(16)]
    for one in said:
        predictor.observe("m", "bf16", one, ttft_ms=200, tpot_ms=20)
    assert 15 < predict(predictor).tpot_ms <= 20.0001


def test_an_outlier_is_only_a_nudge() -> None:
    predictor = Predictor()
    for _ in range(20):
        predictor.observe("m", "bf16", predict(predictor), tpot_ms=10)
    predictor.observe("m", "bf16", predict(predictor), tpot_ms=10_000)
    assert predict(predictor).tpot_ms < 15


def test_a_first_token_that_waited_for_a_load_teaches_nothing_about_prefill() -> None:
    predictor = Predictor()
    cold = predict(predictor, snapshot=with_level(ladder(), "bf16", state=State.STORED))
    predictor.observe("m", "bf16", cold, ttft_ms=5000, tpot_ms=20)
    said = predict(predictor)
    assert said.ttft_ms == pytest.approx(100)
    assert said.tpot_ms > 10


def test_a_new_card_forgets_what_corrected_the_old_one() -> None:
    predictor = Predictor()
    for _ in range(10):
        predictor.observe("m", "bf16", predict(predictor), tpot_ms=20)
    measured = CARDS["bf16"].model_copy(update={"decode_tokens_per_s": {"1": 50.0}})
    said = predict(predictor, snapshot=with_level(ladder(), "bf16", card=measured))
    assert said.tpot_factor == 1.0
    equal = CARDS["bf16"].model_copy()
    predictor.observe("m", "bf16", predict(predictor), tpot_ms=20)
    learned = predict(predictor).tpot_ms
    assert predict(predictor, snapshot=with_level(ladder(), "bf16", card=equal)).tpot_ms == learned


def test_error_and_quantiles() -> None:
    predictor = Predictor()
    predict(predictor)
    assert predictor.error("m", "bf16").tpot is None
    assert predictor.error("m", "nobody").observations == 0
    assert predictor.quantile("m", "bf16", "tpot", 0.95) is None
    said = predict(predictor)
    for percent in range(1, 101):
        predictor.observe("m", "bf16", said, tpot_ms=10 * percent / 100)
    assert predictor.quantile("m", "bf16", "tpot", 0.95) == pytest.approx(0.95)
    assert predictor.quantile("m", "bf16", "tpot", 0.0) == pytest.approx(0.01)
    assert predictor.error("m", "bf16").observations == 100


def test_the_error_shrinks_while_it_learns() -> None:
    predictor = Predictor()
    errors = []
    for _ in range(20):
        predictor.observe("m", "bf16", predict(predictor), tpot_ms=20)
        errors.append(predictor.error("m", "bf16").tpot or 0.0)
    assert errors[0] == pytest.approx(0.5)
    assert errors[-1] < 0.05


def test_an_answer_nobody_predicted_is_ignored() -> None:
    predictor = Predictor()
    predictor.observe("m", "bf16", predict(Predictor()), tpot_ms=20)
    assert predictor.error("m", "bf16").observations == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(CARDS)), anything, anything), max_size=40))
def test_garbage_measurements_leave_predictions_sane(
    garbage: list[tuple[str, float, float]],
) -> None:
    predictor = Predictor()
    for level, ttft, tpot in garbage:
        predictor.observe("m", level, predict(predictor, level), ttft_ms=ttft, tpot_ms=tpot)
    for said, base in zip(
        predictor.predict(400, 100, ladder()), Predictor().predict(400, 100, ladder()), strict=True
    ):
        assert base.tpot_ms / 1e4 <= said.tpot_ms <= base.tpot_ms * 1e4
        assert base.ttft_ms / 1e4 <= said.ttft_ms <= base.ttft_ms * 1e4
    error = predictor.error("m", "bf16")
    assert error.tpot is None or 0 <= error.tpot <= 1e6
    for _ in range(150):
        predictor.observe("m", "bf16", predict(predictor), ttft_ms=80, tpot_ms=8)
    assert predict(predictor).ttft_ms == pytest.approx(80, rel=0.1)
    assert predict(predictor).tpot_ms == pytest.approx(8, rel=0.1)


counts = st.integers(0, 10_000)


@given(
    card=st.builds(
        Card,
        decode_tokens_per_s=st.dictionaries(st.integers(1, 4096).map(str), anything, max_size=4),
        prefill_tokens_per_s=anything,
        load_seconds=anything,
    ),
    stats=st.builds(busy, counts, counts, st.integers(0, 10**9), st.integers(0, 10**9)),
    size=st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)),
)
def test_predictions_are_finite_and_never_negative(
    card: Card, stats: EngineStats, size: tuple[int, int]
) -> None:
    snapshot = with_level(
        ladder(), "bf16", card=card, state=State.STORED, stats=stats, max_running=16
    )
    for said in Predictor().predict(*size, snapshot):
        for value in (said.ttft_ms, said.tpot_ms, said.latency_ms, said.memory_mb):
            assert math.isfinite(value)
            assert value >= 0


def test_state_is_bounded() -> None:
    predictor = Predictor()
    snapshot = ladder()
    for number in range(300):
        predictor.predict(10, 10, replace(snapshot, model=f"m{number}"))
    assert predictor.levels_known <= 1024


def test_every_level_is_charged_for_its_own_kv_cache() -> None:
    """A token's KV takes twice as many bytes at fp32 as at bf16."""
    snapshot = with_level(ladder(), "fp32", kv_bytes_per_token=4000)
    snapshot = with_level(snapshot, "bf16", kv_bytes_per_token=2000)
    fp32, bf16, *_ = Predictor().predict(900, 100, snapshot)
    assert fp32.memory_mb == pytest.approx(68 + 4)
    assert bf16.memory_mb == pytest.approx(34 + 2)


def test_an_answer_of_a_few_tokens_teaches_no_time_per_token() -> None:
    predictor = Predictor()
    before = predict(predictor).tpot_ms
    for _ in range(20):  # drafts come at once: as if a token took nothing
        predictor.observe("m", "bf16", predict(predictor), tpot_ms=0.01, tokens=2)
    assert predict(predictor).tpot_ms == before
    for _ in range(20):
        predictor.observe("m", "bf16", predict(predictor), tpot_ms=5.0, tokens=20)
    assert predict(predictor).tpot_ms < before
