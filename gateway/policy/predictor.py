"""Predicts what a request would cost at each level, and learns from what it did cost.

Starts from the cards (rates measured on an idle host) and the present load; learns how much each
cause of waiting weighs on this host (`regression`), how each level differs, and how far answers
stray (`quantile`). Owns only what it learns; reads no clock, does no I/O. Not thread-safe: the
event loop owns it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeGuard

from gateway.policy.causes import TPOT_MOST, TPOT_PRIOR, TTFT_MOST, TTFT_PRIOR, Arrivals
from gateway.policy.lengths import Length, Lengths
from gateway.policy.prediction import Prediction, Predictions
from gateway.policy.present import MAX_MS, Learned, Present, Size
from gateway.policy.quantile import KINDS, Margins, Spread, pooled_spread
from gateway.policy.regression import Regression
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, LevelFacts

Kind = Literal["ttft", "tpot"]
Predict = Callable[[int, int, LadderSnapshot], Predictions]

GUESSED_TPOT_MS: Final = 30.0  # for a card without rates: any guess, the first answers correct it
GUESSED_PREFILL_MS: Final = 1.0  # per prompt token

_STEADY: Final = 0.02  # weight of a level's newest error while errors look like noise
_MOVED: Final = 0.2  # and what is added while they all point one way
_SMOOTH: Final = 0.15  # of the running means that tell noise from a move
_DOUBT: Final = 8  # answers that a measured card is worth against the first ones
_STEP: Final = math.log(4)  # one observation counts as at most 4x off: an outlier is only a nudge
_HALF: Final = math.log(2)
_LIMIT: Final = math.log(100)  # a factor stays within 1/100 … 100
_TRUST: Final = 0.05  # of cards' step times, in observations: see `Regression`
_TRUST_PREFILL: Final = 0.01  # of those of prefill: the host has a large part in short prompts
_FEWEST: Final = 8  # tokens of an answer that teaches a time per token: drafts come at once
_USUAL: Final = 0.05  # weight of the newest answer in what usually comes
_RENEW: Final = 32  # answers after which what levels borrow from each other is brought up to date
_RATE_SECONDS: Final = 0.7  # over which arrivals are counted, the past fading
_MAX_LEVELS: Final = 1024
_STEPS: Final = 256  # batch sizes whose step times are kept per level


@dataclass(frozen=True, slots=True)
class PredictionError:
    """How far off the predictions of one level are; None before the first measurement.

    `ttft`, `tpot`: running means of |predicted − measured| / measured.
    """

    ttft: float | None
    tpot: float | None
    observations: int


class _Correction:
    """One level's own factor: how its times differ from what the causes common to all levels say.

    A running mean of the log error whose pace follows the errors: slow while they scatter, quick
    while they point one way (the tracking signal of Trigg & Leach, 1967).
    """

    __slots__ = ("bias", "count", "error", "log_factor", "size")

    def __init__(self) -> None:
        self.log_factor = 0.0
        self.count = 0
        self.bias = self.size = 0.0
        self.error: float | None = None

    @property
    def factor(self) -> float:
        return math.exp(self.log_factor)

    def learn(self, measured: float, uncorrected: float, doubt: int) -> None:
        """`uncorrected`: what the causes say now, without the factor; `doubt`: see `_DOUBT`.

        (What they said when the answer was predicted would, with many requests in flight, apply
        the same news once per request and overshoot.)
        """
        surprise = math.log(measured) - math.log(uncorrected) - self.log_factor
        # As steep as the relative error is: what is said too high is further off than too low.
        surprise = min(_STEP, max(-_STEP, surprise)) * math.exp(-min(_STEP, max(-_HALF, surprise)))
        signal = self.bias / self.size if self.size > 0.0 else 0.0
        weight = max(_STEADY + _MOVED * signal * signal, 1.0 / (self.count + 2 + doubt))
        self.bias += _SMOOTH * (surprise - self.bias)
        self.size += _SMOOTH * (abs(surprise) - self.size)
        log_factor = self.log_factor + weight * surprise
        self.log_factor = min(_LIMIT, max(-_LIMIT, log_factor))
        self.count += 1

    def judge(self, measured: float, predicted: float) -> None:
        """Keep the running error of what was said."""
        error = min(abs(predicted - measured) / measured, 1e6)
        self.error = error if self.error is None else self.error + 0.2 * (error - self.error)


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
    promised: Margins = field(init=False)
    steps: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.renew()

    def step_ms(self, batch: int) -> float:
        """One decode step of `batch` sequences alone on the host."""
        step = self.steps.get(batch)
        if step is None:
            if len(self.steps) >= _STEPS:
                self.steps.clear()
            step = self.steps[batch] = _clean(self.card.tpot_ms(batch), GUESSED_TPOT_MS)
        return step

    def factors(self) -> tuple[float, float]:
        return self.ttft.factor, self.tpot.factor

    def margins(self) -> Margins:
        """As of the level's last answer, or of the last time that all levels' were renewed."""
        return self.promised

    def renew(self) -> None:
        self.promised = self.spread.margins(self.pooled)

    def learn(
        self,
        kind: Kind,
        measured: float | None,
        predicted: Prediction,
        common: _Common,
        *,
        teaches: bool = True,
    ) -> None:
        """Learn from one measured time, which may be missing or garbage; unless it `teaches`, only
        how far answers stray."""
        first = kind == "ttft"
        said = predicted.ttft_ms if first else predicted.tpot_ms
        if not (_usable(measured) and _usable(said)):
            return
        own = self.ttft if first else self.tpot
        own.judge(measured, said)
        if teaches and predicted.causes is not None:
            regression = common.ttft if first else common.tpot
            causes = predicted.causes()[0 if first else 1]
            regression.learn(causes, measured / own.factor)
            if _usable(uncorrected := regression.of(causes)):
                own.learn(measured, uncorrected, _DOUBT if self.card.measured else 0)
        self.stray(kind, measured, said, predicted.margins)

    def stray(self, kind: str, measured: float, predicted: float, said: Margins) -> None:
        """Learn how far a measurement was from its prediction."""
        if _usable(predicted):
            index = KINDS.index(kind)
            score = math.log(measured) - math.log(predicted)
            for spread in (self.spread, self.pooled):
                spread.scores[index].learn(score, said.logs[index])


@dataclass(slots=True)
class _Common:
    """What the levels of one model share: the weights of causes, spreads, what usually comes."""

    ttft: Regression = field(
        default_factory=lambda: Regression(TTFT_PRIOR, TTFT_MOST, _TRUST_PREFILL)
    )
    tpot: Regression = field(default_factory=lambda: Regression(TPOT_PRIOR, TPOT_MOST, _TRUST))
    spread: Spread = field(default_factory=pooled_spread)
    answers: int = 0
    arrivals: Arrivals = field(default_factory=Arrivals)

    def learned(self, per_ms: float) -> Learned:
        known = self.arrivals
        arrivals = Arrivals(per_ms, known.tokens, known.prefill_ms) if per_ms else known
        return Learned(self.ttft.weights, self.tpot.weights, arrivals)

    def usual(self, tokens: float, prefill_ms: float) -> None:
        """One more answer was so long and its prompt took so much."""
        known = self.arrivals
        rate = _USUAL if known.tokens else 1.0
        self.arrivals = Arrivals(
            tokens=known.tokens + rate * (tokens - known.tokens),
            prefill_ms=known.prefill_ms + rate * (prefill_ms - known.prefill_ms),
        )


class Predictor:
    """Predictions for a whole ladder at once, and the learning behind them. Bounded state."""

    def __init__(self) -> None:
        self._tracks: OrderedDict[tuple[str, str], _Track] = OrderedDict()
        self._present: dict[str, Present] = {}  # by model; holds no model whose tracks are gone
        self._common: dict[str, _Common] = {}  # likewise
        self._rate = 0.0  # requests per ms, of all models, at `_rated`
        self._rated = -math.inf
        self.lengths = Lengths()

    @property
    def levels_known(self) -> int:
        """How many levels have learned state; the oldest are forgotten beyond a fixed number."""
        return len(self._tracks)

    def arrived(self, now: float) -> None:
        """A request was taken on at `now` (s, of any clock that runs on)."""
        self._rate = self._rate_at(now) + 1.0 / (1000.0 * _RATE_SECONDS)
        self._rated = max(now, self._rated)

    def _rate_at(self, now: float) -> float:
        return self._rate * math.exp(min(0.0, (self._rated - now) / _RATE_SECONDS))

    def under(self, policy: str, now: float | None = None) -> Predict:
        """`predict` for a request of one policy, whose answers are as long as that policy's are; at
        `now` (the clock of `arrived`), so that what has been arriving lately counts."""
        per_ms = 0.0 if now is None else self._rate_at(now)

        def predict(prompt_tokens: int, max_tokens: int, snapshot: LadderSnapshot) -> Predictions:
            size = Size(prompt_tokens, max_tokens, self.lengths.of(policy, max_tokens))
            return self._predict(size, snapshot, per_ms)

        return predict

    def predict(self, prompt_tokens: int, max_tokens: int, snapshot: LadderSnapshot) -> Predictions:
        """One prediction per level of `snapshot`, in its order; always finite and never negative.

        Times are sums of causes (see `causes`), weighted as all levels' answers taught, times the
        level's own factor. Of all `max_tokens` and with no arrivals but those that the snapshot
        tells; `under` knows better.
        """
        size = Size(prompt_tokens, max_tokens, Length.certain(max_tokens))
        return self._predict(size, snapshot, 0.0)

    def _predict(self, size: Size, snapshot: LadderSnapshot, per_ms: float) -> Predictions:
        model = snapshot.model
        present = self._present.get(model)
        if present is None or not present.follow(snapshot.levels):
            tracks = [self._track(model, facts) for facts in snapshot.levels]
            present = self._present[model] = Present(snapshot.levels, tracks)
        return present.predict(size, snapshot, self._of(model).learned(per_ms))

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
        common = self._of(model)
        if predicted.load_ms == 0.0:
            track.learn("ttft", ttft_ms, predicted, common)
            if tokens is not None and _usable(latency_ms):
                expected = predicted.ttft_ms + max(0, tokens - 1) * predicted.tpot_ms
                track.stray("latency", latency_ms, expected, predicted.margins)
        enough = tokens is None or tokens >= _FEWEST
        track.learn("tpot", tpot_ms, predicted, common, teaches=enough)
        if predicted.causes is not None:
            common.usual(tokens or predicted.length.expected, predicted.causes()[0].prompt)
        track.renew()
        common.answers += 1
        present = self._present.get(model)
        if common.answers % _RENEW == 0:
            self._renew(model)
        elif present is not None:
            present.learned(level)

    def _renew(self, model: str) -> None:
        """Levels with few answers promise what all levels' answers taught since."""
        for (name, _), track in self._tracks.items():
            if name == model:
                track.renew()
        if (present := self._present.get(model)) is not None:
            present.renewed()

    def error(self, model: str, level: str) -> PredictionError:
        """The running error of one level."""
        track = self._tracks.get((model, level))
        if track is None:
            return PredictionError(None, None, 0)
        return PredictionError(
            track.ttft.error, track.tpot.error, max(track.ttft.count, track.tpot.count)
        )

    def quantile(self, model: str, level: str, kind: Kind, q: float) -> float | None:
        """The q-quantile of measured / predicted over the last answers of a level, as they were.

        (`Prediction.high` has the calibrated one.) None before the first measurement.
        """
        track = self._tracks.get((model, level))
        scores = track.spread.scores[KINDS.index(kind)] if track else None
        return scores.ratio(q) if scores is not None and scores.count else None

    def _of(self, model: str) -> _Common:
        common = self._common.get(model)
        if common is None:
            common = self._common[model] = _Common()
        return common

    def _track(self, model: str, facts: LevelFacts) -> _Track:
        """The level's track; a changed card starts it afresh: its factors corrected the old one."""
        key = (model, facts.level)
        track = self._tracks.get(key)
        if track is not None and (track.card is facts.card or track.card == facts.card):
            return track
        prefill_ms = _clean(facts.card.prefill_ms(1), GUESSED_PREFILL_MS)
        load_ms = _clean(1000.0 * facts.card.load_seconds, 0.0)
        track = self._tracks[key] = _Track(facts.card, prefill_ms, load_ms, self._of(model).spread)
        self._tracks.move_to_end(key)
        while len(self._tracks) > _MAX_LEVELS:
            (forgotten, _), _ = self._tracks.popitem(last=False)
            self._present.pop(forgotten, None)
            self._common.pop(forgotten, None)
        return track


def _usable(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and value > 0


def _clean(value: float, otherwise: float) -> float:
    return min(value, MAX_MS) if _usable(value) else otherwise
