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
_GROUP = 64  # logits of which the best stands for all, in the search for top-k
# Log-probabilities, less that of the best, down to which ids are sorted before all of them are.
_FLOORS = (-4.0, -7.5, -np.inf)

Logits = NDArray[np.float32]
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
            counts = list(self.counts.values())
            times = torch.tensor(counts, dtype=row.dtype, device=row.device)
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
    lines: Logits = logits.numpy()
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


def _adjusted(line: Tensor, row: RowState) -> Logits:
    copy = line.clone()
    row.adjust(copy)
    found: Logits = copy.numpy()
    return found


def _pick_one(line: Logits, row: RowState) -> int:
    """The token of one line of logits [vocab]."""
    if not row.random:
        return int(line.argmax())
    kept, weights = weigh(line, row.params)
    index = invert(weights, row.draw())
    return index if kept is None else int(kept[index])


def weigh(line: Logits, params: SamplingParams) -> tuple[NDArray[Any] | None, Weights]:
    """What a line of logits [vocab] is drawn from: ids that the cut-offs leave (None: all), and
    what their probabilities are in proportion to."""
    heat = max(params.temperature, COLDEST)
    best = line.max()
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return None, _weights(line, best, heat)
    kept = _kept(line, best, heat, params)
    weights = _weights(line[kept], best, heat)
    if params.min_p > 0:
        likely = weights >= np.float32(params.min_p)
        kept, weights = kept[likely], weights[likely]
    return kept, weights


def _weights(logits: Logits, best: np.float32, heat: float) -> Weights:
    """In proportion to the probabilities; that of the logit `best` is 1, so that a tiny
    temperature cannot overflow."""
    weights = logits - best
    with np.errstate(over="ignore"):
        weights *= np.float32(1.0 / heat)
    np.exp(weights, out=weights)
    return weights


def _kept(line: Logits, best: np.float32, heat: float, params: SamplingParams) -> NDArray[Any]:
    """Ids that top-k and, of what it leaves, the nucleus (Holtzman et al. 2020) leave.

    Of equal logits the lower ids come first. Min-p (Nguyen et al. 2024) needs no order. Only the
    ids that are likely enough to matter are sorted; what they are is the same however many.
    """
    top_k = params.top_k if params.top_k < len(line) else 0
    if not top_k and params.top_p >= 1.0:
        return np.arange(len(line))
    total = None if top_k else float(_piece_sums(_weights(line, best, heat)).sum())
    for floor in _floors(line, best, heat, top_k):
        kept = np.flatnonzero(line >= floor)
        logits = line[kept]
        found = _cut(logits, best, heat, (top_k, params.top_p), total)
        if found is None:
            continue
        count, least = found
        kept, logits = kept[logits >= least], logits[logits >= least]
        if count < len(kept):
            kept = np.delete(kept, np.flatnonzero(logits == least)[count - len(kept) :])
        break
    return kept


def _floors(line: Logits, best: np.float32, heat: float, top_k: int) -> list[np.float32]:
    """Logits down to which the ids are likely to be enough, each lower than the one before."""
    if not top_k:
        return [best + np.float32(heat * floor) for floor in _FLOORS]
    # As many groups as ids are wanted have one such logit each: surely enough.
    groups = line[: len(line) // _GROUP * _GROUP].reshape(_GROUP, -1).max(0)
    if top_k > len(groups):
        return [np.float32(-np.inf)]
    return [np.partition(groups, len(groups) - top_k)[-top_k]]


def _cut(
    logits: Logits, best: np.float32, heat: float, cuts: tuple[int, float], total: float | None
) -> tuple[int, np.float32] | None:
    """How many of the likeliest `logits` top-k (0: off) and the nucleus leave and the least of
    them; None if they leave more than these."""
    top_k, top_p = cuts
    if not top_k:
        order = np.sort(logits)
        return _nucleus(order, _weights(order, best, heat), top_p, total)
    order = np.sort(np.partition(logits, len(logits) - top_k)[-top_k:])
    found = _nucleus(order, _weights(order, best, heat), top_p, None) if top_p < 1.0 else None
    return found or (top_k, order[0])


def _nucleus(
    order: Logits, weights: Weights, top_p: float, total: float | None
) -> tuple[int, np.float32] | None:
    """Of `order`, rising logits, the fewest last ones that weigh `top_p` of `total` (None: of all
    of them) or more: how many and the first of them; None if all weigh less."""
    sums = weights[::-1].cumsum(dtype=np.float64)
    count = int(sums.searchsorted(top_p * (sums[-1] if total is None else total))) + 1
    return (count, order[-count]) if count <= len(order) else None


def invert(weights: Weights, uniform: float) -> int:
    """Smallest index whose cumulative share of `weights` exceeds `uniform`, in [0, 1).

    Pieces are found by their sums and only the right one is added up one by one.
    """
    sums = _piece_sums(weights).cumsum()
    target = uniform * sums[-1]
    piece = _first_above(sums, target)
    start = piece * _PIECE
    before = float(sums[piece - 1]) if piece else 0.0
    inner = weights[start : start + _PIECE].cumsum(dtype=np.float64)
    return start + _first_above(inner, target - before)


def _piece_sums(weights: Weights) -> NDArray[np.float64]:
    """Sums of pieces of `_PIECE` weights, the last of what is left over."""
    whole = len(weights) // _PIECE * _PIECE
    # einsum adds in several lanes at once, np.sum in one tree: 14 against 39 us for 128,256.
    sums = np.einsum("ij->i", weights[:whole].reshape(-1, _PIECE)).astype(np.float64)
    return np.append(sums, weights[whole:].sum(dtype=np.float64))


def _first_above(sums: NDArray[np.float64], target: float) -> int:
    """Index of the first of rising `sums` above `target`; rounding may not reach past the last
    one that rises."""
    return int(sums.searchsorted(min(target, np.nextafter(sums[-1], 0.0)), side="right"))
