"""Predictions by the cards alone: an idle host, one sequence, nothing learned.

What INFaaS and other choosers of variants by profile go by; `predict: card` in the configuration,
to see what knowing the present load is worth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gateway.engine.base import EngineStats
from gateway.policy.decision import Predict
from gateway.policy.prediction import Prediction, Predictions
from gateway.policy.predictor import Predictor
from gateway.variants.variant import LadderSnapshot

_IDLE = EngineStats()


class CardPredictor(Predictor):
    """A `Predictor` to which every host is idle and every answer says nothing."""

    def under(self, policy: str, now: float | None = None) -> Predict:
        """See `Predictor.under`: as long as the request allows, whatever the policy's are."""
        return self.predict

    def predict(self, prompt_tokens: int, max_tokens: int, snapshot: LadderSnapshot) -> Predictions:
        """See `Predictor.predict`."""
        return super().predict(prompt_tokens, max_tokens, _idle(snapshot))

    def arrived(self, now: float) -> None:
        """Who arrives is of no interest."""

    def observe(self, model: str, level: str, predicted: Prediction, **measured: Any) -> None:
        """Nothing is learned."""


def _idle(snapshot: LadderSnapshot) -> LadderSnapshot:
    levels = tuple(
        facts if facts.stats == _IDLE else replace(facts, stats=_IDLE) for facts in snapshot.levels
    )
    return replace(
        snapshot, levels=levels, host_running=0, host_waiting_prompt_tokens=0, building=0
    )
