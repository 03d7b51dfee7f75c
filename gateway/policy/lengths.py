"""How long answers get: per policy, the share of answers that go on past every length. Learned.

Answers that were cut at `max_tokens` tell only that they would have gone on, so lengths are
estimated as survival times are (Kaplan & Meier, 1958): of the answers that reached a length, how
many ended there by themselves. The past fades. Bounded state; no clock, no I/O.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from operator import neg
from typing import Final

_PER_DOUBLING: Final = 8  # buckets, of equal width on a log scale
_DOUBLINGS: Final = 17  # up to 131,072 tokens; longer answers are in the last bucket
_MEMORY: Final = 0.998  # what an answer counts after the next one: 500 answers back, a third
_DOUBT: Final = 2.0  # answers assumed to have gone on past every length
_HEAVY: Final = 1e9
_FEW: Final = 32  # answers after each of which lengths are estimated anew; then only after …
_OFTEN: Final = 8  # … so many
_MAX_POLICIES: Final = 256


def _edges() -> tuple[int, ...]:
    """First length of every bucket: 1, 2, 3 … as long as buckets would be narrower than 1."""
    steps = (round(2 ** (i / _PER_DOUBLING)) for i in range(_PER_DOUBLING * _DOUBLINGS))
    return tuple(sorted(set(steps)))


_EDGES: Final = _edges()


@dataclass(frozen=True, slots=True)
class Length:
    """What is expected of one answer, in tokens; at least 1. `upper(share)` bounds it."""

    expected: float
    survival: tuple[float, ...] = ()
    most: int = 1

    @staticmethod
    @lru_cache(1024)
    def certain(tokens: int) -> Length:
        """Nothing is known but the most that it may be."""
        return Length(float(max(1, tokens)), (), max(1, tokens))

    def upper(self, share: float) -> float:
        """The length that a share of answers does not exceed."""
        bucket = bisect_left(self.survival, share - 1.0, key=neg)
        if bucket + 1 >= len(self.survival):
            return float(self.most)
        return max(self.expected, float(min(self.most, _EDGES[bucket + 1] - 1)))


class _Lengths:
    """Of one policy. `survival[i]`: share of answers longer than bucket i."""

    __slots__ = ("_answers", "_cut", "_ended", "_weight", "expected", "survival")

    def __init__(self) -> None:
        self._answers = 0
        self._weight = 1.0  # of the newest answer: growing it is as good as fading the past
        self._ended = [0.0] * len(_EDGES)
        self._cut = [0.0] * len(_EDGES)
        self.survival: tuple[float, ...] = (1.0,) * len(_EDGES)
        self.expected: list[float] = [float(edge) for edge in _EDGES]  # when cut at each edge

    def learn(self, tokens: int, *, cut: bool) -> None:
        bucket = bisect_right(_EDGES, tokens) - 1
        (self._cut if cut else self._ended)[bucket] += self._weight
        self._weight /= _MEMORY
        if self._weight > _HEAVY:
            self._ended, self._cut = (
                [count / self._weight for count in counts] for counts in (self._ended, self._cut)
            )
            self._weight = 1.0
        self._answers += 1
        if self._answers <= _FEW or self._answers % _OFTEN == 0:
            self._estimate()

    def _estimate(self) -> None:
        doubt = _DOUBT * self._weight
        reached = sum(self._ended) + sum(self._cut) + doubt
        survival, expected, left, mean = [], [], 1.0, 1.0
        for index, (edge, ended, lost) in enumerate(
            zip(_EDGES, self._ended, self._cut, strict=True)
        ):
            expected.append(mean)
            left *= 1.0 - min(1.0, ended / reached)
            survival.append(left)
            reached = max(doubt, reached - ended - lost)
            if index + 1 < len(_EDGES):
                mean += left * (_EDGES[index + 1] - edge)
        self.survival, self.expected = tuple(survival), expected

    def of(self, max_tokens: int) -> Length:
        bucket = bisect_right(_EDGES, max_tokens) - 1
        left = self.survival[bucket - 1] if bucket else 1.0
        beyond = max_tokens - _EDGES[bucket]
        left = self.survival[bucket] if beyond else left
        return Length(
            min(float(max_tokens), self.expected[bucket] + left * beyond),
            self.survival,
            max_tokens,
        )


class Lengths:
    """The lengths of every policy's answers; the least recently taught are forgotten."""

    def __init__(self) -> None:
        self._policies: OrderedDict[str, _Lengths] = OrderedDict()

    def __len__(self) -> int:
        return len(self._policies)

    def learn(self, policy: str, tokens: int, max_tokens: int) -> None:
        """One finished answer. One that reached `max_tokens` was cut there."""
        if tokens < 1:
            return
        known = self._policies.get(policy)
        if known is None:
            known = self._policies[policy] = _Lengths()
            if len(self._policies) > _MAX_POLICIES:
                self._policies.popitem(last=False)
        self._policies.move_to_end(policy)
        known.learn(tokens, cut=tokens >= max_tokens)

    def of(self, policy: str | None, max_tokens: int) -> Length:
        """What to expect of an answer of at most `max_tokens`."""
        known = self._policies.get(policy) if policy is not None else None
        if known is None or max_tokens < 1:
            return Length.certain(max_tokens)
        return known.of(max_tokens)
