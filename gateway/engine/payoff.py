"""Whether speculation pays, and how many tokens to draft: from what steps took and what was kept.

A step over m rows takes T(m) seconds, whether they are m sequences or fewer of them with drafts to
verify; a drafter takes d seconds per token. With acceptance α, k drafts of a row yield
1 + α + … + αᵏ tokens. So a step of b rows yields Σ yields ÷ (T(b + Σ k) + k · d) tokens a second
with drafts and b ÷ T(b) without, and the larger one is taken. T, d and α are measured while
serving: what is not known yet is tried now and then, what was slower is tried ever more rarely.
Where plain steps are launched ahead of the host and others wait for it, T(b) without drafts is
another time than T of the same rows with them.

Owns figures and the arithmetic. Torch-free, and it has no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

_MARGIN = 1.03  # speculation has to be this much faster
_COLD = 2  # first samples of a size
_ENOUGH = 3  # samples after them before a time is relied upon
_EXACT = 8  # largest size that is measured by itself
_SAMPLES = 15  # of a size, the last ones
_WORTH = 0.2  # a token that is kept more rarely is not drafted
_UNTRIED = 3  # tokens of a first draft
_FIRST_PATIENCE, _LAST_PATIENCE = 8, 1024  # plain steps before another try
_WARMTH = 16  # steps
_WARMING = 3  # plain steps that may be lost by them, where plain ones are launched ahead
_COSTS = 32  # plain steps before another try, for each one that a try is expected to lose
_REFRESH = 128  # speculative steps before a plain one, so that its time stays known
_MEMORY = 0.99  # what older verdicts weigh after each step
_PRIOR_WEIGHT = 8.0  # verdicts that a drafter's prior stands for


class Offer(NamedTuple):
    """What a drafter can do for one row: at most `most` tokens, each kept with chance `alpha`."""

    alpha: float
    most: int


class Choice(NamedTuple):
    """Draft `counts[i]` tokens for row i."""

    drafter: str
    counts: list[int]


class _Bid(NamedTuple):
    """What a drafter's best choice promises: tokens of a step, and a second."""

    choice: Choice | None
    tokens: float
    rate: float


_NOTHING = _Bid(None, 0.0, 0.0)


class Curve:
    """Seconds by size: medians of the last samples where it was measured, lines between and beyond.

    Medians, because another program's time slice is as long as many steps.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}
        self._medians: dict[int, float] = {}
        self._sizes: list[int] = []

    def note(self, size: int, seconds: float) -> None:
        """One sample. The first ones of a size may hold a compilation or a graph's capture and
        are left out."""
        size = _slot(size)
        seen = self._seen[size] = self._seen.get(size, 0) + 1
        if seen <= _COLD:
            return
        samples = self._samples.setdefault(size, deque(maxlen=_SAMPLES))
        samples.append(seconds)
        self._medians[size] = median(samples)
        if len(self._sizes) < len(self._medians):
            self._sizes = sorted(self._medians)

    def known(self, size: int) -> bool:
        """Whether the size itself was measured often enough."""
        return self._seen.get(_slot(size), 0) >= _COLD + _ENOUGH

    def at(self, size: int) -> float | None:
        """Seconds at `size`; None when nothing was measured."""
        sizes, medians = self._sizes, self._medians
        if not sizes:
            return None
        if size in medians or len(sizes) == 1 or size < sizes[0]:
            return medians.get(size, medians[sizes[0]])
        index = min(bisect_left(sizes, size), len(sizes) - 1)
        low, high = sizes[index - 1], sizes[index]
        slope = max(0.0, (medians[high] - medians[low]) / (high - low))
        return medians[low] + slope * (size - low)


def _slot(size: int) -> int:
    """The size that a sample counts for: large ones are seldom the same twice, and so would not be
    learned in time."""
    return size if size <= _EXACT else _EXACT // 2 * round(2 * size / _EXACT)


@dataclass(slots=True)
class Verdicts:
    """How often drafted tokens were kept, recent ones counting more."""

    tested: float = 0.0
    kept: float = 0.0

    def note(self, tested: int, kept: int) -> None:
        self.tested = self.tested * _MEMORY + tested
        self.kept = self.kept * _MEMORY + kept

    def rate(self, prior: float) -> float:
        """The chance that a token is kept, starting from `prior`."""
        return (self.kept + _PRIOR_WEIGHT * prior) / (self.tested + _PRIOR_WEIGHT)


@dataclass(slots=True)
class Payoff:
    """The figures of one target level on one host."""

    idle_patience: int = _FIRST_PATIENCE  # plain steps after one that nobody could draft for
    ahead: Curve | None = None  # plain steps by rows, where they are launched ahead
    steps: Curve = field(default_factory=Curve)  # by rows: the others, or all
    drafts: dict[str, Curve] = field(default_factory=dict)  # a drafter's, by rows, per token
    _patience: int = _FIRST_PATIENCE
    _plain: int = 0  # plain steps since the last try
    _fast: int = 0  # speculative steps since the last plain one
    _batch: int = 0  # rows when it was chosen last
    _warm: int = 0  # steps to go on asking for after one that promised to pay

    def due(self, batch: int) -> bool:
        """Whether `choose` may say anything but None for `batch` rows; else tell `skip`."""
        if self.ahead is not None and not self.ahead.known(batch):
            return False  # to ask would be to wait
        return self._warm > 0 or self._plain >= self._patience or batch != self._batch

    def skip(self) -> None:
        """A plain step is taken without asking."""
        self._plain += 1

    def hurry(self, batch: int, offers: Mapping[str, Sequence[Offer]], places: int) -> None:
        """Ask soon if these offers, which may be a step old, promise to pay."""
        plain = self._without.at(batch)
        if plain is not None and self._without.known(batch):
            found = [self._best(name, plain, rows, places) for name, rows in offers.items()]
            if any(bid.rate * plain > _MARGIN * batch for bid in found):
                self._plain = self._patience

    def choose(
        self, batch: int, offers: Mapping[str, Sequence[Offer]], places: int
    ) -> Choice | None:
        """The best draft for a step of `batch` rows, or None for a plain step.

        Args:
            offers: by drafter, what it can do for each row.
            places: rows that a step can have.
        """
        plain, self._batch = self._without.at(batch), batch
        if plain is None or not self._without.known(batch):
            self._plain, self._batch = self._plain + 1, 0  # ask again
            return None
        found = (self._best(name, plain, rows, places) for name, rows in offers.items())
        best = max(found, key=lambda bid: bid.rate, default=_NOTHING)
        if best.rate * plain > _MARGIN * batch:
            waiting = (self.steps.at(batch) or 2 * plain) / plain - 1  # what asking costs
            self._warm = round(min(_WARMTH, max(2, _WARMING / max(waiting, 1e-9))))
            self._patience, self._plain = _FIRST_PATIENCE, 0
            self._fast = 0 if self._fast >= _REFRESH else self._fast + 1
            return best.choice if self._fast else None
        tried = self._plain >= self._patience
        self._warm, self._fast = max(0, self._warm - 1), 0
        self._plain = 0 if tried else self._plain + 1
        if not tried:
            return None
        if best.choice is None:
            self._patience = max(self._patience, self.idle_patience)
            return None
        lost = best.tokens / best.rate / plain - best.tokens / batch
        self._patience = min(max(2 * self._patience, round(_COSTS * lost)), _LAST_PATIENCE)
        return best.choice

    @property
    def _without(self) -> Curve:
        """Steps without drafts."""
        return self.steps if self.ahead is None else self.ahead

    def _best(self, name: str, plain: float, rows: Sequence[Offer], places: int) -> _Bid:
        """The fastest number of tokens to draft, and the tokens a second that it promises.

        Args:
            plain: seconds of a step without drafts; where no other was measured, of any.
        """
        curve = self.drafts.setdefault(name, Curve())
        drafting = sum(row.most > 0 for row in rows)
        each = curve.at(drafting) if drafting else None
        most = max((row.most for row in rows), default=0)
        if each is None:
            each, most = 0.0, min(most, _UNTRIED)
        counts, chances = [0] * len(rows), [1.0] * len(rows)
        total, tokens, best = len(rows), float(len(rows)), _NOTHING
        for k in range(1, most + 1):
            for i, row in enumerate(rows):
                chance = chances[i] * row.alpha
                if counts[i] == k - 1 < row.most and chance >= _WORTH and total < places:
                    counts[i], chances[i] = k, chance
                    tokens, total = tokens + chance, total + 1
            if k not in counts:
                break
            seconds = (self.steps.at(total) or plain) + k * each
            if seconds > 0 and tokens / seconds > best.rate:
                best = _Bid(Choice(name, list(counts)), tokens, tokens / seconds)
        return best
