"""From logits to tokens, for a whole batch at once; each row by its own parameters and generator.

A row's token depends on its logits, its parameters and its seed only, never on the rest of the
batch: every row draws one uniform number from its own generator and inverts its own cumulative
distribution, in the order of token ids.
Reported log-probabilities are of the model's raw distribution (fp32), before any adjustment.

This is the host's way, row by row in numpy, whose passes over a vocabulary need no threads to be
quick; `device_sampler` does the same for a batch on an accelerator, and `draw` chooses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gateway.engine.base import SamplingParams
from gateway.engine.grammar import Matcher

COLDEST = 1e-6  # a lower temperature is this one: fp32 could not divide by it
_AHEAD = 32  # uniform numbers drawn at once
_PIECE = 512  # weights summed in fp32 before their sums are added up in float64
# Weights (the best is 1) down to which candidates of a cut-off are tried before all are sorted.
_FLOORS = (2.0**-6, 2.0**-11)

Weights = NDArray[np.float32]


class RowState:
    """What sampling one sequence remembers between tokens.

    Attributes:
        penalised: past tokens change the logits.
        adjusted: anything but the temperature and the cut-offs changes the logits.
        lockstep: a token must be known before the next one can be picked.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], matcher: Matcher | None = None
    ) -> None:
        p = self.params = params
        self.matcher = matcher
        self.penalised = bool(
            p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        )
        self.lockstep = self.penalised or matcher is not None
        self.adjusted = self.lockstep or bool(p.logit_bias)
        self.random = p.temperature > 0
        self.cut = p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0
        self.counts: Counter[int] = Counter()
        self._prompt = frozenset(prompt) if p.repetition_penalty != 1.0 else frozenset()
        self._generator: torch.Generator | None = None
        self._drawn: list[float] = []

    def draw(self) -> float:
        """The sequence's next uniform number in [0, 1)."""
        if not self._drawn:
            generator = self._seeded()
            self._drawn = torch.rand(_AHEAD, generator=generator, dtype=torch.float64).tolist()
            self._drawn.reverse()
        return self._drawn.pop()

    def _seeded(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator()
            if self.params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.params.seed % 2**64)
        return self._generator

    def accept(self, token: int) -> None:
        """Note the sampled token."""
        if self.penalised:
            self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    def adjust(self, row: Tensor) -> None:
        """Apply penalties, bias and grammar to `row` [vocab] in place.

        Repetition as in CTRL (Keskar et al. 2019), presence and frequency as OpenAI defines them.
        """
        p = self.params
        if p.repetition_penalty != 1.0 and (seen := list(self._prompt | self.counts.keys())):
            index = torch.tensor(seen, device=row.device)
            old = row[index]
            row[index] = torch.where(
                old > 0, old / p.repetition_penalty, old * p.repetition_penalty
            )
        if self.counts and (p.presence_penalty or p.frequency_penalty):
            index = torch.tensor(list(self.counts), device=row.device)
            times = torch.tensor(list(self.counts.values()), device=row.device)
            row[index] -= p.frequency_penalty * times + p.presence_penalty
        if bias := {t: b for t, b in p.logit_bias.items() if 0 <= t < row.shape[0]}:
            index = torch.tensor(list(bias), device=row.device)
            row[index] += torch.tensor(list(bias.values()), dtype=row.dtype, device=row.device)
        if self.matcher is not None:
            allowed = torch.from_numpy(self.matcher.allowed()).to(row.device)
            row[: allowed.shape[0]].masked_fill_(~allowed[: row.shape[0]], float("-inf"))
            row[allowed.shape[0] :] = float("-inf")


@dataclass(slots=True)
class Scored:
    """A token with its raw log-probability (None when not asked for) and the best alternatives."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[Scored]:
    """Pick and note the next token of every row of fp32 [rows, vocab], which stays as it is."""
    scored = pick(logits.cpu(), rows)
    for row, item in zip(rows, scored, strict=True):
        row.accept(item.token)
    return scored


def pick(logits: Tensor, rows: Sequence[RowState]) -> list[Scored]:
    """The next token of every row of fp32 [rows, vocab] in the host's memory; not changed."""
    lines: NDArray[np.float32] = logits.numpy()
    if not any(row.random or row.adjusted for row in rows):
        picked: list[int] = lines.argmax(1).tolist()
    else:
        picked = [
            _pick_one(_adjusted(logits[i], row) if row.adjusted else lines[i], row)
            for i, row in enumerate(rows)
        ]
    scored = [Scored(token) for token in picked]
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if wanted:
        most = max(rows[i].params.logprobs or 0 for i in wanted)
        found = score(logits[wanted], [picked[i] for i in wanted], most)
        for i, item in zip(wanted, found, strict=True):
            scored[i] = Scored(item.token, item.logprob, item.top[: rows[i].params.logprobs])
    return scored


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log-probability of `tokens[i]` under `logits[i]` (fp32 [n, vocab]) and the `top` best."""
    chosen = torch.tensor(tokens, device=logits.device)
    return read_scores(tokens, *score_tensors(logits, chosen, top))


def score_tensors(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n] of `tokens` [n]; ids and log-probabilities [n, top] of the best."""
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    best = torch.topk(logprobs, min(top, logits.shape[1]), dim=-1)
    return chosen, best.indices, best.values


def read_scores(tokens: Sequence[int], chosen: Tensor, ids: Tensor, best: Tensor) -> list[Scored]:
    """What `score_tensors` gave, as `Scored`."""
    return [
        Scored(token, logprob, tuple(zip(top, values, strict=True)))
        for token, logprob, top, values in zip(
            tokens, chosen.tolist(), ids.tolist(), best.tolist(), strict=True
        )
    ]


def _adjusted(line: Tensor, row: RowState) -> Weights:
    copy = line.clone()
    row.adjust(copy)
    found: Weights = copy.numpy()
    return found


def _pick_one(line: Weights, row: RowState) -> int:
    """The token of one line of logits [vocab]."""
    if not row.random:
        return int(line.argmax())
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    weights = line - line.max()
    with np.errstate(over="ignore"):
        weights *= np.float32(1.0 / max(row.params.temperature, COLDEST))
    np.exp(weights, out=weights)
    if not row.cut:
        return _invert(weights, row.draw())
    kept = _kept(weights, row.params)
    return int(kept[_invert(weights[kept], row.draw())])


def _kept(weights: Weights, params: SamplingParams) -> NDArray[Any]:
    """Ids that top-k, nucleus (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) leave.

    Args:
        weights: [vocab] in proportion to the probabilities; the best, always kept, is 1.

    Of equal weights the lower ids come first; min-p and the nucleus are of what top-k leaves.
    """
    count, least = _cut(weights, params)
    kept = np.flatnonzero(weights >= max(least, np.float32(params.min_p)))
    if 0 < count < len(kept):
        last = np.flatnonzero(weights[kept] == least)
        kept = np.delete(kept, last[count - len(kept) :])
    return kept


def _cut(weights: Weights, params: SamplingParams) -> tuple[int, np.float32]:
    """How many top-k and the nucleus leave, and the least weight among them; (0, 0): all."""
    top_k = params.top_k if 0 < params.top_k < len(weights) else 0
    if top_k:
        best: Weights = np.partition(weights, len(weights) - top_k)[-top_k:]
        best.sort()
        everything = (top_k, best[0])
        if params.top_p >= 1.0:
            return everything
        total = float(best.sum(dtype=np.float64))
        return _nucleus(best[::-1], params.top_p, total) or everything
    if params.top_p >= 1.0:
        return 0, np.float32(0)
    total = float(weights.sum())
    for floor in _FLOORS:
        best = weights[weights >= floor]
        best.sort()
        if found := _nucleus(best[::-1], params.top_p, total):
            return found
    return _nucleus(np.sort(weights)[::-1], params.top_p, total) or (0, np.float32(0))


def _nucleus(best: Weights, top_p: float, total: float) -> tuple[int, np.float32] | None:
    """Of `best`, in falling order, the shortest beginning that weighs `top_p` of `total` or more:
    its length and its last weight; None if all of it is less."""
    sums = best.cumsum(dtype=np.float64)
    count = int(sums.searchsorted(top_p * total)) + 1
    return (count, best[count - 1]) if count <= len(best) else None


def _invert(weights: Weights, uniform: float) -> int:
    """Smallest index whose cumulative share of `weights` exceeds `uniform`, in [0, 1).

    Pieces are found by their sums and only the right one is added up one by one.
    """
    start, whole = 0, len(weights) // _PIECE * _PIECE
    sums = weights[:whole].reshape(-1, _PIECE).sum(1).astype(np.float64)
    sums = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    target = uniform * sums[-1]
    piece = _first_above(sums, target)
    start = piece * _PIECE
    before = float(sums[piece - 1]) if piece else 0.0
    inner = weights[start : start + _PIECE].cumsum(dtype=np.float64)
    return start + _first_above(inner, target - before)


def _first_above(sums: NDArray[np.float64], target: float) -> int:
    """Index of the first of rising `sums` above `target`; rounding may not reach past the last
    one that rises."""
    return int(sums.searchsorted(min(target, np.nextafter(sums[-1], 0.0)), side="right"))
