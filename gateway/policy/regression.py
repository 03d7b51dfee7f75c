"""A time as a sum of causes, each with a learned weight that is never negative.

Recursive least squares with forgetting, held near a prior while there is little to go by, and
solved under non-negative weights by coordinate descent: since no cause can take time away, more
load never predicts less. Errors are relative and weigh as in a regression to the median (iterative
reweighting), so one answer that met something unforeseen moves little. Pure and bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Final

_KEEP: Final = 0.995  # what an observation counts after the next one: 200 back, a third
_NEAR: Final = 0.08  # log errors below this are squared, those beyond count as themselves
_FAR: Final = math.log(20.0)  # who is further off than this was no measurement of this sum
_LEAST: Final = 0.02  # of its prior: a cause on a card never vanishes, nor then do predictions
_SWEEPS: Final = 2  # of coordinate descent per observation, from the last solution


class Regression:
    """`weights` per cause; `learn` replaces them."""

    __slots__ = ("_gram", "_moment", "_most", "_prior", "_trust", "weights")

    def __init__(self, prior: Sequence[float], most: Sequence[float], trust: float) -> None:
        """`most`: the weights' upper bounds; `trust`: how many exact observations of each cause
        alone the prior is worth."""
        self._prior = tuple(prior)
        self._most = tuple(most)
        self._trust = trust
        self._gram = [[0.0] * len(prior) for _ in prior]
        self._moment = [0.0] * len(prior)
        self.weights = tuple(prior)

    def of(self, causes: Sequence[float]) -> float:
        said: float = sum(map(mul, self.weights, causes))
        return said

    def learn(self, causes: Sequence[float], measured: float) -> None:
        """`causes`: non-negative, in ms at weight 1; `measured`: ms, positive and finite."""
        predicted = self.of(causes)
        if not (predicted > 0.0 and math.isfinite(predicted)):
            return
        off = abs(math.log(measured) - math.log(predicted))
        if off > _FAR:
            return
        weight = _NEAR / max(off, _NEAR)
        scaled = [x / measured for x in causes]
        for index, (row, one) in enumerate(zip(self._gram, scaled, strict=True)):
            if one:
                pull = weight * one
                pairs = zip(row, scaled, strict=True)
                row[:] = [_KEEP * old + pull * other for old, other in pairs]
            elif row[index]:  # most causes never occurred: nothing fades
                row[:] = [_KEEP * old for old in row]
        self._moment = [
            _KEEP * old + weight * one for old, one in zip(self._moment, scaled, strict=True)
        ]
        self._descend()

    def _descend(self) -> None:
        weights, trust = list(self.weights), self._trust
        for _ in range(_SWEEPS):
            for index, (row, moment, prior) in enumerate(
                zip(self._gram, self._moment, self._prior, strict=True)
            ):
                fit = sum(map(mul, row, weights)) if row[index] else 0.0
                slope = moment + trust * prior - fit - trust * weights[index]
                weight = weights[index] + slope / (row[index] + trust)
                least, most = _LEAST * prior, self._most[index]
                weights[index] = least if weight < least else most if weight > most else weight
        self.weights = tuple(weights)
