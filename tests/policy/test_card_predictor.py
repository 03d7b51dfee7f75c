"""Predictions by the cards alone."""

from __future__ import annotations

from gateway.policy.card_predictor import CardPredictor
from gateway.policy.predictor import Predictor
from tests.policy.ladders import CARDS, busy, ladder, with_level


def test_a_busy_host_is_predicted_like_an_idle_one() -> None:
    idle = ladder()
    crowded = with_level(idle, "bf16", stats=busy(8, waiting=4, prompt=900, remaining=800))
    card = CardPredictor()
    said = card.under("p", 1.0)(100, 50, crowded)
    assert list(said) == list(Predictor().predict(100, 50, idle))
    live = Predictor().predict(100, 50, crowded)
    assert live[1].latency_ms > said[1].latency_ms


def test_nothing_is_learned() -> None:
    card, snapshot = CardPredictor(), ladder()
    before = card.predict(100, 50, snapshot)
    for level, predicted in zip(CARDS, before, strict=True):
        card.arrived(1.0)
        card.observe("m", level, predicted, ttft_ms=9000.0, tpot_ms=900.0, latency_ms=1e5, tokens=9)
    assert list(card.predict(100, 50, snapshot)) == list(before)
