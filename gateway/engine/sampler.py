"""From logits to tokens, for a whole batch at once; each row by its own parameters and generator.

A row's token depends on its logits, its parameters and its seed only, never on the rest of the
batch: every row draws one uniform number from its own generator and inverts its own cumulative
distribution.
Reported log-probabilities are of the model's raw distribution (fp32), before any adjustment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gateway.engine.base import SamplingParams
from gateway.engine.grammar import Matcher

_COLDEST = 1e-6  # a lower temperature is this one: fp32 could not divide by it


class RowState:
    """What sampling one sequence remembers between tokens."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], matcher: Matcher | None = None
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed % 2**64)
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self.counts: Counter[int] = Counter()

    def draw(self) -> float:
        """The sequence's next uniform number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def accept(self, token: int) -> None:
        """Note the sampled token."""
        if self.penalised:
            self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    @property
    def penalised(self) -> bool:
        p = self.params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)

    @property
    def adjusted(self) -> bool:
        """Whether anything but the temperature and the cut-offs changes the logits."""
        return self.penalised or bool(self.params.logit_bias) or self.matcher is not None

    @property
    def cut(self) -> bool:
        p = self.params
        return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0

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


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its raw log-probability (None when not asked for) and the best alternatives."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[Scored]:
    """Pick the next token of every row.

    Args:
        logits: fp32 [rows, vocab]; not changed.
    """
    adjusted = logits
    if any(row.adjusted for row in rows):
        adjusted = logits.clone()
        for index, row in enumerate(rows):
            if row.adjusted:
                row.adjust(adjusted[index])
    tokens = adjusted.argmax(-1)
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if random:
        chosen = torch.tensor(random, device=logits.device)
        tokens[chosen] = _draw(adjusted[chosen], [rows[i] for i in random])
    picked = tokens.tolist()
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    scored = [Scored(token) for token in picked]
    if wanted:
        most = max(rows[i].params.logprobs or 0 for i in wanted)
        found = score(logits[wanted], [picked[i] for i in wanted], most)
        for i, item in zip(wanted, found, strict=True):
            scored[i] = Scored(item.token, item.logprob, item.top[: rows[i].params.logprobs])
    for row, token in zip(rows, picked, strict=True):
        row.accept(token)
    return scored


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log-probability of `tokens[i]` under `logits[i]` (fp32 [n, vocab]) and the `top` best."""
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = torch.topk(logprobs, min(top, logits.shape[1]), dim=-1)
    return [
        Scored(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def _draw(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Tokens [rows] by inverse transform sampling from softmax(logits / temperature), cut off."""
    device = logits.device
    heat = [max(row.params.temperature, _COLDEST) for row in rows]
    temperature = torch.tensor(heat, dtype=logits.dtype, device=device)[:, None]
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    uniform = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=device)
    tokens = torch.empty(len(rows), dtype=torch.long, device=device)
    for cut in (False, True):
        members = [i for i, row in enumerate(rows) if row.cut is cut]
        if not members:
            continue
        index = torch.tensor(members, device=device)
        if cut:
            part, order = scaled[index].sort(dim=-1, descending=True, stable=True)
            part = _cut_off(part, [rows[i].params for i in members])
            picked = _invert(part, uniform[index])
            tokens[index] = order.gather(1, picked[:, None])[:, 0]
        else:
            tokens[index] = _invert(scaled[index], uniform[index])
    return tokens


def _cut_off(sorted_logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """-inf for what top-k, nucleus (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) exclude.

    Args:
        sorted_logits: [rows, vocab], best first; the best is always kept.
    """
    device = sorted_logits.device
    vocab = sorted_logits.shape[1]
    rank = torch.arange(vocab, device=device)
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    kept = sorted_logits.masked_fill(rank >= top_k, float("-inf"))
    probs = torch.softmax(kept, -1)
    top_p = torch.tensor([p.top_p for p in params], dtype=probs.dtype, device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], dtype=probs.dtype, device=device)[:, None]
    before = probs.cumsum(-1) - probs
    outside = (before >= top_p) | (probs < min_p * probs[:, :1])
    outside[:, 0] = False
    return kept.masked_fill(outside, float("-inf"))


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """Smallest index whose cumulative probability exceeds `uniform` (float64 [rows])."""
    cumulative = torch.softmax(logits, -1, dtype=torch.float64).cumsum(-1)
    target = uniform * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # Rounding at the very end must not reach past the last possible token.
    last = (logits > float("-inf")).long().cumsum(-1).argmax(-1)
    return torch.minimum(index, last)
