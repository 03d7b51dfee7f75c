"""Speculative decoding of one level: draft, verify in one step of the target, keep what holds.

Verification decodes the drafted positions of a sequence as rows of one batch: every layer writes
all rows' keys and values before any row attends, so row i sees the drafts before it. That is the
very code (kernels, captured graphs) that decodes several sequences, so a token is computed as it
is without speculation. Greedy rows keep drafts that the target would have picked; sampled rows
keep them by `acceptance`. Rows with a grammar or with a seed and a temperature are not drafted
for: a seed promises the same tokens whatever else runs.

Owns no sequence: blocks and tokens are the scheduler's, text and events the core's. Synchronous.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gateway.engine.acceptance import distributions, judge
from gateway.engine.device_sampler import upload
from gateway.engine.drafters import DRAFTERS, Draft, Drafter, LevelDrafter
from gateway.engine.draw import launch
from gateway.engine.host_acceptance import Shares, judge_row
from gateway.engine.model import Model
from gateway.engine.payoff import Curve, Offer, Payoff, Verdicts
from gateway.engine.runners import AheadRunner, StepRunner
from gateway.engine.sampler import RowState, Scored, score
from gateway.engine.scheduler import Scheduler
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.tokenizer import Tokenizer

OFF, AUTO = "off", "auto"
_AHEAD_PATIENCE = 64
_GLANCE = 8  # steps launched ahead, after which drafters that cost nothing are looked at
_FLOWING = 3  # steps launched ahead; the first ones wait for nothing, or for what came before
_LIGHTER = 0.8  # a level with at most this share of another's bytes may draft for it


class Level(NamedTuple):
    """A loaded level: `name` is `model@level`."""

    name: str
    model: Model
    tokenizer: Tokenizer
    runner: StepRunner

    def drafts_for(self, other: Level, mode: str) -> bool:
        """Whether it is the one that `mode` names, or with `auto` likely to be faster, and means
        the same by its tokens."""
        if self.tokenizer is not other.tokenizer:
            return False
        if self.model.vocab_size != other.model.vocab_size:
            return False
        if mode == AUTO:
            return self.model.resident_bytes <= _LIGHTER * other.model.resident_bytes
        return self.short == mode

    @property
    def short(self) -> str:
        """Its name without the model's."""
        return self.name.partition("@")[2]


def make_speculator(
    mode: str, level: Level, scheduler: Scheduler, *, places: int
) -> Speculator | None:
    """What speculates for a level under `engine.speculate`; None: it never does.

    Quantized KV pools are left alone: a group of keys that a draft completed cannot be undone.
    """
    if level.model.layout.kv is not None:
        return None
    return Speculator(mode, level, scheduler, places=places)


def enlist(members: Sequence[Speculator]) -> None:
    """Let those whose sequences lie in one pool know who may draft for them."""
    for target in members:
        others = [m.level for m in members if m is not target]
        target.drafters = [make() for name, make in DRAFTERS.items() if target.mode in (AUTO, name)]
        target.drafters += [
            LevelDrafter(level.short, level.runner)
            for level in others
            if level.drafts_for(target.level, target.mode)
        ]


class _Open(NamedTuple):
    """A step whose end is not known yet: the next one's beginning."""

    turn: int
    began: float
    first: Tokens
    rows: int
    drafting: float  # seconds
    payoff: Payoff
    ahead: int = 0  # launched before the last one was read: so many in a row


class Speculator:
    """Decides about and takes the speculative steps of one target level.

    Attributes:
        drafters: who may draft now; the core changes it as levels come and go.
        payoff: of steps whose rows are greedy; `sampled`: of others, which are judged otherwise.
    """

    def __init__(
        self,
        mode: str,
        level: Level,
        scheduler: Scheduler,
        *,
        places: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            mode: `auto`, the name of a drafter, or the level that drafts.
            places: rows that a step of the runner can have.
        """
        self.mode = mode
        self.level = level
        self.drafters: list[Drafter] = []
        # Asking costs a runner that is launched ahead a step that is not.
        self._ahead = isinstance(level.runner, AheadRunner)
        self.payoff, self.sampled = (
            Payoff(_AHEAD_PATIENCE, ahead=Curve()) if self._ahead else Payoff() for _ in range(2)
        )
        self._runner = level.runner
        self._scheduler = scheduler
        self._places = places
        self._clock = clock
        self._open: _Open | None = None
        self._levels: dict[str, Verdicts] = {}
        self._rows: WeakKeyDictionary[RowState, Verdicts] = WeakKeyDictionary()

    def step(
        self, turn: int, batch: Sequence[Tokens], rows: Sequence[RowState]
    ) -> list[list[Scored]] | None:
        """Decode `batch`, several tokens at once where it pays; None: it does not, decode plainly.

        Args:
            turn: counts the core's steps.

        Returns:
            Per sequence its next tokens, at least one. Keys and values are right for the
            sequence as it is and for all of these but the last.
        """
        if not self.due(rows):
            self.skip(turn, batch, rows)
            return None
        began, payoff = self._clock(), self._payoff(rows)
        self._close(turn, began, batch)
        choice = payoff.choose(len(batch), self._offers(batch, rows), self._places)
        if choice is None:
            self._open = _Open(turn, began, batch[0], len(batch), 0.0, payoff)
            return None
        drafter = next(d for d in self.drafters if d.name == choice.drafter)
        counts = [
            min(count, self._scheduler.reserve(seq, count)) if count else 0
            for seq, count in zip(batch, choice.counts, strict=True)
        ]
        draft = drafter.propose(batch, rows, counts)
        drafted = max(map(len, draft.tokens))
        drafting = self._clock() - began
        if drafted:
            active = sum(map(bool, draft.tokens))
            payoff.drafts.setdefault(drafter.name, Curve()).note(active, drafting / drafted)
        found = self._verify(batch, rows, draft)
        self._note(drafter, rows, draft, found)
        places = len(batch) + sum(map(len, draft.tokens))
        self._open = _Open(turn, began, batch[0], places, drafting, payoff)
        return found

    def skip(self, turn: int, batch: Sequence[Tokens], rows: Sequence[RowState]) -> None:
        """`batch` is decoded plainly without asking; its last tokens may be unknown."""
        began, payoff = self._clock(), self._payoff(rows)
        last = self._open
        self._close(turn, began, batch)
        payoff.skip()
        before = last.ahead if last is not None and last.turn == turn - 1 else 0
        ahead = before + 1 if self._ahead else 0
        if ahead and ahead % _GLANCE == 0:
            payoff.hurry(len(batch), self._offers(batch, rows, free=True), self._places)
        self._open = _Open(turn, began, batch[0], len(batch), 0.0, payoff, ahead)

    def due(self, rows: Sequence[RowState]) -> bool:
        """Whether `step` may do more than decode plainly; it needs all tokens known then."""
        room = 2 * len(rows) <= self._places  # else hardly a row could be drafted for
        return bool(self.drafters) and room and self._payoff(rows).due(len(rows))

    def _payoff(self, rows: Sequence[RowState]) -> Payoff:
        return self.sampled if any(row.random for row in rows) else self.payoff

    def _close(self, turn: int, now: float, batch: Sequence[Tokens]) -> None:
        """Learn what the step before took, if nothing came between."""
        last, self._open = self._open, None
        if last is None or last.turn != turn - 1 or last.first is not batch[0]:
            return
        curve = last.payoff.steps
        if last.ahead and last.payoff.ahead is not None:
            if last.ahead < _FLOWING:
                return
            curve = last.payoff.ahead
        curve.note(last.rows, now - last.began - last.drafting)

    def _offers(
        self, batch: Sequence[Tokens], rows: Sequence[RowState], *, free: bool = False
    ) -> dict[str, list[Offer]]:
        """What drafters can do for each row; `free`: those only that need no model for it."""
        room = [
            seq.max_tokens - seq.generated - 1 if _may(row) else 0
            for seq, row in zip(batch, rows, strict=True)
        ]
        offers = {}
        for drafter in self.drafters:
            if free and isinstance(drafter, LevelDrafter):
                continue
            level = self._levels.setdefault(drafter.name, Verdicts()).rate(drafter.prior)
            offers[drafter.name] = [
                Offer(
                    self._rows.setdefault(row, Verdicts()).rate(level),
                    min(left, drafter.most(seq, row)) if left else 0,
                )
                for seq, row, left in zip(batch, rows, room, strict=True)
            ]
        return offers

    def _verify(
        self, batch: Sequence[Tokens], rows: Sequence[RowState], draft: Draft
    ) -> list[list[Scored]]:
        """One step of the target over all rows and their drafts, and what each row keeps."""
        views = [
            view
            for seq, tokens in zip(batch, draft.tokens, strict=True)
            for view in _views(seq, tokens)
        ]
        with torch.inference_mode():
            logits = self._runner.decode(views)
            spans, begin = [], 0
            for tokens in draft.tokens:
                spans.append(range(begin, begin + len(tokens) + 1))
                begin += len(tokens) + 1
            kept = _keep(logits, spans, rows, draft)
            plain = [i for i, tokens in enumerate(draft.tokens) if not tokens]
            found: list[list[Scored]] = [[] for _ in batch]
            if plain:
                first = torch.tensor([spans[i].start for i in plain], device=logits.device)
                drawn = launch([logits[first]], [rows[i] for i in plain]).collect()
                for i, scored in zip(plain, drawn, strict=True):
                    found[i] = [scored]
            for i, tokens in kept.items():
                found[i] = _scored(logits[spans[i].start :], tokens, rows[i])
        return found

    def _note(
        self,
        drafter: Drafter,
        rows: Sequence[RowState],
        draft: Draft,
        found: Sequence[Sequence[Scored]],
    ) -> None:
        """Learn how many drafts were kept; the first that is not ends a row's test."""
        tested = kept = 0
        for row, tokens, scored in zip(rows, draft.tokens, found, strict=True):
            good = len(scored) - 1
            if tokens:
                self._rows.setdefault(row, Verdicts()).note(min(good + 1, len(tokens)), good)
                tested, kept = tested + min(good + 1, len(tokens)), kept + good
        self._levels.setdefault(drafter.name, Verdicts()).note(tested, kept)
        drafted = sum(map(len, draft.tokens))
        self._scheduler.count_drafts(self.level.name, drafted, kept)


def _may(row: RowState) -> bool:
    """Whether its tokens may be drafted (see the module)."""
    return row.matcher is None and not (row.random and row.params.seed is not None)


def _views(seq: Tokens, drafts: Sequence[int]) -> list[Tokens]:
    """The sequence as it is, and with one, two … of the drafts, on the same blocks."""
    tokens = [*seq.tokens, *drafts]
    length = len(seq.tokens)
    return [
        replace(seq, tokens=tokens[: length + more], keys=[]) for more in range(len(drafts) + 1)
    ]


def _keep(
    logits: Tensor, spans: Sequence[range], rows: Sequence[RowState], draft: Draft
) -> dict[int, list[int]]:
    """The next tokens of every row that was drafted for: kept drafts and one of the target's."""
    drafted = [i for i, tokens in enumerate(draft.tokens) if tokens]
    if any(rows[i].adjusted for i in drafted):
        logits = logits.clone()
        for i in drafted:
            if rows[i].adjusted:
                _adjust(logits, spans[i], rows[i], draft.tokens[i])
    kept = {}
    greedy = [i for i in drafted if not rows[i].random]
    if greedy:
        best = logits.argmax(-1).tolist()
        for i in greedy:
            kept[i] = _matching(draft.tokens[i], [best[at] for at in spans[i]])
    sampled = [i for i in drafted if rows[i].random]
    if sampled:
        judged = _judged_on_host if logits.device.type == "cpu" else _judged
        kept |= judged(logits, spans, rows, draft, sampled)
    return kept


def _adjust(logits: Tensor, span: range, row: RowState, tokens: Sequence[int]) -> None:
    """Penalties and bias of one row's positions, each after the drafts before it, in place."""
    before = row.counts.copy()
    for at, token in zip(span, [*tokens, None], strict=True):
        row.adjust(logits[at])
        if token is not None and row.penalised:
            row.counts[token] += 1
    row.counts = before


def _matching(drafts: Sequence[int], best: Sequence[int]) -> list[int]:
    """The target's own tokens up to the first that was drafted otherwise, that one included."""
    same = next((i for i, token in enumerate(drafts) if token != best[i]), len(drafts))
    return list(best[: same + 1])


def _judged_on_host(
    logits: Tensor,
    spans: Sequence[range],
    rows: Sequence[RowState],
    draft: Draft,
    chosen: Sequence[int],
) -> dict[int, list[int]]:
    """`_keep` for rows that are sampled, logits being in the host's memory."""
    lines, found = logits.numpy(), {}
    for i in chosen:
        begin, params = spans[i].start, rows[i].params
        found[i] = judge_row(
            lambda at, begin=begin, params=params: Shares.of(lines[begin + at], params),  # type: ignore[misc]
            None if draft.probs is None else draft.probs[i],  # type: ignore[arg-type]
            draft.tokens[i],
            lines.shape[1],
            rows[i].draw,
        )
    return found


def _judged(
    logits: Tensor,
    spans: Sequence[range],
    rows: Sequence[RowState],
    draft: Draft,
    chosen: Sequence[int],
) -> dict[int, list[int]]:
    """`_keep` for rows that are sampled."""
    device = logits.device
    tokens = [draft.tokens[i] for i in chosen]
    most = max(map(len, tokens))
    # Rows with fewer drafts are filled up with their last position, which nobody looks at.
    places = [min(spans[i].start + j, spans[i].stop - 1) for i in chosen for j in range(most + 1)]
    params = [rows[i].params for i in chosen for _ in range(most + 1)]
    target = distributions(logits[upload(places, torch.long, device)], params)
    uniform = [[rows[i].draw() for _ in range(most + 1)] for i in chosen]
    probs = None
    if isinstance(draft.probs, Tensor):
        probs = draft.probs[upload(chosen, torch.long, device), :most]
    kept, following = judge(
        target.view(len(chosen), most + 1, -1),
        probs,
        upload([[*line, *[0] * (most - len(line))] for line in tokens], torch.long, device),
        upload([len(line) for line in tokens], torch.long, device),
        upload(uniform, torch.float64, device),
    )
    ends = torch.stack([kept, following], 1).tolist()
    return {
        i: [*line[:good], last] for i, line, (good, last) in zip(chosen, tokens, ends, strict=True)
    }


def _scored(logits: Tensor, tokens: Sequence[int], row: RowState) -> list[Scored]:
    """The tokens with their log-probabilities, if they are wanted; `logits` [≥ n, vocab]."""
    if row.params.logprobs is None:
        return [Scored(token) for token in tokens]
    return score(logits[: len(tokens)], tokens, row.params.logprobs)
