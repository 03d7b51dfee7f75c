"""Predicts what a request would cost at each level, and learns from what it did cost.

Starts from the cards (rates measured on an idle host) and the present load, then corrects per level
with two learned factors. Owns only those factors and its own error; knows no policy, does no I/O.
Not thread-safe: the event loop owns it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from gateway.policy.lengths import Length, Lengths
from gateway.policy.prediction import Prediction, Predictions
from gateway.policy.present import MAX_MS, Present
from gateway.policy.quantile import KINDS, Margins, Spread, pooled_spread
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, LevelFacts

Kind = Literal["ttft", "tpot"]
Predict = Callable[[int, int, LadderSnapshot], Predictions]

GUESSED_TPOT_MS: Final = 30.0  # for a card without rates: any guess, the first answers correct it
GUESSED_PREFILL_MS: Final = 1.0  # per prompt token

_RATE: Final = 0.2  # weight of the newest observation: 99 % of a change is learned in 20
_STEP: Final = math.log(4)  # one observation counts as at most 4x off: an outlier is only a nudge
_LIMIT: Final = math.log(100)  # a factor stays within 1/100 … 100
_WINDOW: Final = 256  # measured/predicted ratios kept per level for quantiles
_MAX_LEVELS: Final = 1024


@dataclass(frozen=True, slots=True)
class PredictionError:
    """How far off the predictions of one level are; None before the first measurement.

    `ttft`, `tpot`: running means of |predicted − measured| / measured.
    """

    ttft: float | None
    tpot: float | None
    observations: int


class _Correction:
    """One learned factor: an exponentially weighted mean of log(measured / uncorrected)."""

    __slots__ = ("count", "error", "log_factor", "ratios")

    def __init__(self) -> None:
        self.log_factor = 0.0
        self.count = 0
        self.error: float | None = None
        self.ratios: deque[float] = deque(maxlen=_WINDOW)

    @property
    def factor(self) -> float:
        return math.exp(self.log_factor)

    def learn(self, measured: float, predicted: float, factor: float) -> None:
        """`predicted` carries `factor`, which may be older than today's; only its raw part counts.

        (Stepping by measured/predicted instead would, with many requests in flight, apply the same
        news once per request and overshoot.)
        """
        if not (_usable(measured) and _usable(predicted) and _usable(factor)):
            return
        surprise = math.log(measured) - math.log(predicted) + math.log(factor) - self.log_factor
        weight = max(_RATE, 1.0 / (self.count + 2))
        step = weight * min(_STEP, max(-_STEP, surprise))
        self.log_factor = min(_LIMIT, max(-_LIMIT, self.log_factor + step))
        self.count += 1
        self.ratios.append(min(1e6, measured / predicted))
        error = min(abs(predicted - measured) / measured, 1e6)
        self.error = error if self.error is None else self.error + _RATE * (error - self.error)


@dataclass(slots=True)
class _Track:
    """What is known of one level: its card's step times, cached, and its two corrections."""

    card: Card
    prefill_ms: float
    load_ms: float
    pooled: Spread
    ttft: _Correction = field(default_factory=_Correction)
    tpot: _Correction = field(default_factory=_Correction)
    spread: Spread = field(default_factory=Spread)
    steps: dict[int, float] = field(default_factory=dict)

    def step_ms(self, batch: int) -> float:
        """One decode step of `batch` sequences alone on the host."""
        step = self.steps.get(batch)
        if step is None:
            if len(self.steps) >= _WINDOW:
                self.steps.clear()
            step = self.steps[batch] = _clean(self.card.tpot_ms(batch), GUESSED_TPOT_MS)
        return step

    def factors(self) -> tuple[float, float]:
        return self.ttft.factor, self.tpot.factor

    def margins(self) -> Margins:
        return self.spread.margins(self.pooled)

    def stray(self, kind: str, measured: float | None, predicted: float, said: Margins) -> None:
        """Learn how far a measurement was from its prediction."""
        if measured is None or not (_usable(measured) and _usable(predicted)):
            return
        index = KINDS.index(kind)
        score = math.log(measured) - math.log(predicted)
        for spread in (self.spread, self.pooled):
            spread.scores[index].learn(score, said.logs[index])


class Predictor:
    """Predictions for a whole ladder at once, and the learning behind them. Bounded state."""

    def __init__(self) -> None:
        self._tracks: OrderedDict[tuple[str, str], _Track] = OrderedDict()
        self._present: dict[str, Present] = {}  # by model; holds no model whose tracks are gone
        self._pooled = pooled_spread()
        self.lengths = Lengths()

    @property
    def levels_known(self) -> int:
        """How many levels have learned state; the oldest are forgotten beyond a fixed number."""
        return len(self._tracks)

    def under(self, policy: str) -> Predict:
        """`predict` for requests of one policy: answers are as long as that policy's are."""

        def predict(prompt_tokens: int, max_tokens: int, snapshot: LadderSnapshot) -> Predictions:
            length = self.lengths.of(policy, max_tokens)
            return self.predict(prompt_tokens, max_tokens, snapshot, length)

        return predict

    def predict(
        self,
        prompt_tokens: int,
        max_tokens: int,
        snapshot: LadderSnapshot,
        length: Length | None = None,
    ) -> Predictions:
        """One prediction per level of `snapshot`, in its order; always finite and never negative.

        The model: levels take turns on the same cores, so a step of one lasts as long as a step of
        every level that has work; prompts wait for the prompts before them at their level and share
        the cores with prompts of other levels; when all slots are taken, a sequence must end first.
        """
        present = self._present.get(snapshot.model)
        if present is None or not present.follow(snapshot.levels):
            tracks = [self._track(snapshot.model, facts) for facts in snapshot.levels]
            present = self._present[snapshot.model] = Present(snapshot.levels, tracks)
        length = length or Length.certain(max_tokens)
        return present.predict(prompt_tokens, max_tokens, snapshot, length)

    def observe(
        self,
        model: str,
        level: str,
        predicted: Prediction,
        *,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        latency_ms: float | None = None,
        tokens: int | None = None,
    ) -> None:
        """Learn from one finished request: what `predict` said and what was measured.

        A TTFT (and so a latency) that held a load or a build teaches nothing about prefill and is
        left out. A latency is compared with what was predicted for as many `tokens`; without
        `tokens` it is left out. Values that are not positive and finite are ignored.
        """
        track = self._tracks.get((model, level))
        if track is None:
            return
        if predicted.load_ms == 0.0:
            if ttft_ms is not None:
                track.ttft.learn(ttft_ms, predicted.ttft_ms, predicted.ttft_factor)
            track.stray("ttft", ttft_ms, predicted.ttft_ms, predicted.margins)
            if tokens is not None:
                expected = predicted.ttft_ms + max(0, tokens - 1) * predicted.tpot_ms
                track.stray("latency", latency_ms, expected, predicted.margins)
        if tpot_ms is not None:
            track.tpot.learn(tpot_ms, predicted.tpot_ms, predicted.tpot_factor)
        track.stray("tpot", tpot_ms, predicted.tpot_ms, predicted.margins)
        if (present := self._present.get(model)) is not None:
            present.learned(level)

    def error(self, model: str, level: str) -> PredictionError:
        """The running error of one level."""
        track = self._tracks.get((model, level))
        if track is None:
            return PredictionError(None, None, 0)
        return PredictionError(
            track.ttft.error, track.tpot.error, max(track.ttft.count, track.tpot.count)
        )

    def quantile(self, model: str, level: str, kind: Kind, q: float) -> float | None:
        """The q-quantile of measured / predicted over the last answers of a level.

        Multiply a prediction by it to get a bound that a share `q` of answers kept. None before the
        first measurement.
        """
        track = self._tracks.get((model, level))
        ratios = sorted((track.ttft if kind == "ttft" else track.tpot).ratios) if track else []
        if not ratios:
            return None
        return ratios[min(len(ratios) - 1, max(0, math.ceil(q * len(ratios)) - 1))]

    def _track(self, model: str, facts: LevelFacts) -> _Track:
        """The level's track; a changed card starts it afresh: its factors corrected the old one."""
        key = (model, facts.level)
        track = self._tracks.get(key)
        if track is not None and (track.card is facts.card or track.card == facts.card):
            return track
        prefill_ms = _clean(facts.card.prefill_ms(1), GUESSED_PREFILL_MS)
        load_ms = _clean(1000.0 * facts.card.load_seconds, 0.0)
        track = self._tracks[key] = _Track(facts.card, prefill_ms, load_ms, self._pooled)
        self._tracks.move_to_end(key)
        while len(self._tracks) > _MAX_LEVELS:
            (forgotten, _), _ = self._tracks.popitem(last=False)
            self._present.pop(forgotten, None)
        return track


def _usable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _clean(value: float, otherwise: float) -> float:
    return min(value, MAX_MS) if _usable(value) else otherwise
