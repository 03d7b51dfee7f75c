"""`acceptance` for rows whose logits are in the host's memory: numpy, one row, one token at a time.

A position is looked at only if all drafts before it were kept, and a vocabulary is gone through
only where a token is drawn. Pure arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.engine.base import SamplingParams
from gateway.engine.sampler import Weights, invert, weigh


class Shares(NamedTuple):
    """A distribution over a vocabulary.

    Attributes:
        ids: of the tokens that have a share, rising; None: all have.
        weights: in proportion to which they are drawn.
        total: of the weights.
    """

    ids: NDArray[Any] | None
    weights: Weights
    total: float

    @classmethod
    def of(cls, line: NDArray[np.float32], params: SamplingParams) -> Shares:
        """What the sampler draws from, of adjusted logits [vocab]."""
        ids, weights = weigh(line, params)
        return cls(ids, weights, float(weights.sum(dtype=np.float64)))

    def chance(self, token: int) -> float:
        """The probability of a token."""
        index = token
        if self.ids is not None:
            index = int(self.ids.searchsorted(token))
            if index == len(self.ids) or self.ids[index] != token:
                return 0.0
        return float(self.weights[index]) / self.total

    def draw(self, uniform: float) -> int:
        """The token at `uniform`, in [0, 1)."""
        index = invert(self.weights, uniform)
        return index if self.ids is None else int(self.ids[index])

    def whole(self, vocab: int) -> NDArray[np.float64]:
        """Probabilities [vocab]."""
        found = np.zeros(vocab)
        found[slice(None) if self.ids is None else self.ids] = self.weights / self.total
        return found


def judge_row(
    target: Callable[[int], Shares],
    draft: Sequence[Shares] | None,
    tokens: Sequence[int],
    vocab: int,
    uniform: Callable[[], float],
) -> list[int]:
    """The drafted tokens that are kept, and the one that follows them.

    Args:
        target: p before the i-th drafted token, and after the last.
        draft: q of each; None: every token was proposed with certainty.
        uniform: the next number in [0, 1), independent of the drafts.
    """
    for index, token in enumerate(tokens):
        p = target(index)
        q = 1.0 if draft is None else draft[index].chance(token)
        if uniform() * q < p.chance(token):
            continue
        rest = p.whole(vocab)
        if draft is None:
            rest[token] = 0.0
        else:
            rest = np.maximum(rest - draft[index].whole(vocab), 0.0)
        # By rounding alone, p may lie below q everywhere: then p ≈ q, and p itself is what is left.
        instead = invert(rest.astype(np.float32), uniform()) if rest.any() else p.draw(uniform())
        return [*tokens[:index], instead]
    return [*tokens, target(len(tokens)).draw(uniform())]
