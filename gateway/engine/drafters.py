"""Who drafts: another level of the same model, or the text itself.

A drafter proposes tokens that a target then verifies; what it proposes changes how fast tokens
come, never which (`acceptance`). A level drafts on the target's own KV blocks: where two levels
share a layout, the target's keys and values of the text so far are better than the draft's own,
nothing has to be prefilled twice or kept twice, and what the draft writes behind the text is
overwritten by the verification of the same positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gateway.engine.acceptance import distributions, draw
from gateway.engine.device_sampler import upload
from gateway.engine.host_acceptance import Shares
from gateway.engine.runners import AheadRunner, StepRunner
from gateway.engine.sampler import RowState
from gateway.engine.scheduler import UNKNOWN
from gateway.engine.scheduler import Sequence as Tokens

_GRAMS = (4, 3, 2)  # tokens at the end that must have occurred before, the longest first
_WIDTH = array("i").itemsize


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposals for the rows of a step.

    Attributes:
        tokens: per row, possibly none.
        probs: fp32 [rows, most, vocab]: what each token of a sampled row was drawn from, or on the
            host a list of it per row; None: the tokens are certain, or no row is sampled.
    """

    tokens: list[list[int]]
    probs: Tensor | list[list[Shares]] | None = None


class Drafter(Protocol):
    """Proposes tokens.

    Attributes:
        name: in cards and metrics.
        prior: the share of its tokens that is expected to be kept before any was judged.
    """

    name: str
    prior: float

    def most(self, seq: Tokens, row: RowState) -> int:
        """How many tokens it can propose after `seq` now; after what is known of it, if its last
        ones are not."""
        ...

    def propose(
        self, batch: Sequence[Tokens], rows: Sequence[RowState], counts: Sequence[int]
    ) -> Draft:
        """At most counts[i] tokens after batch[i], whose blocks have room for them. Sequences and
        row states are as before when it returns."""
        ...


class LevelDrafter:
    """A faster level of the same model, in whose runner's pool the target's sequences lie."""

    prior = 0.8
    _MOST = 8

    def __init__(self, name: str, runner: StepRunner) -> None:
        self.name = name
        self._runner = runner
        self._ahead = runner if isinstance(runner, AheadRunner) else None

    def most(self, seq: Tokens, row: RowState) -> int:
        """See `Drafter.most`."""
        return self._MOST

    def propose(
        self, batch: Sequence[Tokens], rows: Sequence[RowState], counts: Sequence[int]
    ) -> Draft:
        """See `Drafter.propose`. Token by token, greedy rows by their best, others drawn."""
        lengths = [len(seq.tokens) for seq in batch]
        seen = [row.counts.copy() if row.penalised else None for row in rows]
        try:
            if self._ahead is not None and not any(row.adjusted for row in rows):
                return _on_device(self._ahead, batch, rows, counts)
            return _step_by_step(self._runner, batch, rows, counts)
        finally:
            for seq, row, length, before in zip(batch, rows, lengths, seen, strict=True):
                del seq.tokens[length:]
                if before is not None:
                    row.counts = before


def _step_by_step(
    runner: StepRunner, batch: Sequence[Tokens], rows: Sequence[RowState], counts: Sequence[int]
) -> Draft:
    """A draft whose every token is known before the next one is computed; it is left at the end of
    `batch` and in the rows' counts."""
    tokens: list[list[int]] = [[] for _ in batch]
    shares: list[list[Shares]] = [[] for _ in batch]
    probs = _Probs(rows, max(counts))
    for step in range(max(counts)):
        active = [i for i, count in enumerate(counts) if count > step]
        logits = runner.decode([batch[i] for i in active])
        if logits.device.type == "cpu":
            places = [shares[i] for i in active]
            drawn = _next_on_host(logits, [rows[i] for i in active], places)
        else:
            picked, found = _next(logits, [rows[i] for i in active])
            probs.note(step, active, found)
            drawn = picked.tolist()
        for i, token in zip(active, drawn, strict=True):
            tokens[i].append(token)
            batch[i].tokens.append(token)
            if rows[i].penalised:
                rows[i].counts[token] += 1
    if any(row.random for row in rows) and probs.lines is None:
        return Draft(tokens, shares)
    return Draft(tokens, probs.lines)


def _on_device(
    runner: AheadRunner, batch: Sequence[Tokens], rows: Sequence[RowState], counts: Sequence[int]
) -> Draft:
    """`_step_by_step` for rows that nothing adjusts: the device goes from step to step by itself,
    and the host reads all tokens at the end. Leaves unknown ones at the end of `batch`."""
    picked: list[tuple[list[int], Tensor]] = []  # rows of a step, and their tokens
    probs = _Probs(rows, max(counts))
    for step in range(max(counts)):
        active = [i for i, count in enumerate(counts) if count > step]
        views = [batch[i] for i in active]
        if not picked:
            logits = runner.decode(views)
        else:
            before, ids = picked[-1]
            if len(before) > len(active):
                ids = ids[upload([before.index(i) for i in active], torch.long, ids.device)]
            logits = runner.decode_from(views, ids)
        following, found = _next(logits, [rows[i] for i in active])
        probs.note(step, active, found)
        picked.append((active, following))
        for seq in views:
            seq.tokens.append(UNKNOWN)
    tokens: list[list[int]] = [[] for _ in batch]
    if picked:
        drawn = iter(torch.cat([ids for _, ids in picked]).tolist())
        for active, _ in picked:
            for i in active:
                tokens[i].append(next(drawn))
    return Draft(tokens, probs.lines)


class _Probs:
    """What the tokens of sampled rows were drawn from: `lines` fp32 [rows, most, vocab], None as
    long as nothing was drawn."""

    def __init__(self, rows: Sequence[RowState], most: int) -> None:
        self.lines: Tensor | None = None
        self._shape = len(rows), most

    def note(self, step: int, active: Sequence[int], found: Tensor | None) -> None:
        """`found` [active, vocab]: of one step."""
        if found is None:
            return
        if self.lines is None:
            shape = (*self._shape, found.shape[1])
            self.lines = torch.zeros(shape, dtype=found.dtype, device=found.device)
        self.lines[upload(active, torch.long, found.device), step] = found


def _next_on_host(
    logits: Tensor, rows: Sequence[RowState], shares: Sequence[list[Shares]]
) -> list[int]:
    """A token per row; what a sampled row's was drawn from is added to its `shares`."""
    lines = adjusted(logits, rows).numpy()
    tokens = []
    for line, row, seen in zip(lines, rows, shares, strict=True):
        if not row.random:
            tokens.append(int(line.argmax()))
            continue
        seen.append(Shares.of(line, row.params))
        tokens.append(seen[-1].draw(row.draw()))
    return tokens


def _next(logits: Tensor, rows: Sequence[RowState]) -> tuple[Tensor, Tensor | None]:
    """A token per row, int64 [rows], and what it was drawn from (zeros for greedy rows; None: all
    are)."""
    logits = adjusted(logits, rows)
    chosen = [i for i, row in enumerate(rows) if row.random]
    if not chosen:
        return logits.argmax(-1), None
    uniform = upload([rows[i].draw() for i in chosen], torch.float64, logits.device)
    if len(chosen) == len(rows):
        probs = distributions(logits, [row.params for row in rows])
        return draw(probs, uniform), probs
    index = upload(chosen, torch.long, logits.device)
    some = distributions(logits[index], [rows[i].params for i in chosen])
    probs = torch.zeros_like(logits).index_copy_(0, index, some)
    return logits.argmax(-1).index_copy_(0, index, draw(some, uniform)), probs


def adjusted(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Penalties, bias and grammar applied; `logits` fp32 [rows, vocab] stay as they are."""
    if any(row.adjusted for row in rows):
        logits = logits.clone()
        for index, row in enumerate(rows):
            if row.adjusted:
                row.adjust(logits[index])
    return logits


class LookupDrafter:
    """Prompt lookup: what followed the last few tokens when they occurred before in the sequence.

    Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding. Needs no model and pays
    where answers repeat their prompt: edits, extraction, quotations, code.
    """

    name = "lookup"
    prior = 0.5
    _MOST = 8

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[RowState, array[int]] = WeakKeyDictionary()

    def most(self, seq: Tokens, row: RowState) -> int:
        """See `Drafter.most`."""
        return len(self._continuation(seq, row))

    def propose(
        self, batch: Sequence[Tokens], rows: Sequence[RowState], counts: Sequence[int]
    ) -> Draft:
        """See `Drafter.propose`."""
        found = zip(batch, rows, counts, strict=True)
        return Draft([self._continuation(seq, row)[:most] for seq, row, most in found])

    def _continuation(self, seq: Tokens, row: RowState) -> list[int]:
        """What followed the latest earlier occurrence of the longest possible end of `seq`."""
        text = self._texts.get(row)
        if text is None:
            text = self._texts[row] = array("i")
        text.extend(seq.tokens[len(text) : len(seq.tokens) - seq.pending])
        data = text.tobytes()
        for size in _GRAMS:
            if size >= len(text):
                continue
            after = _find(data, data[-size * _WIDTH :])
            if after is not None:
                return list(text[after : after + self._MOST])
        return []


def _find(data: bytes, end: bytes) -> int | None:
    """Index of the item after the last occurrence of `end` in `data` before its own end."""
    limit = len(data) - 1
    while (at := data.rfind(end, 0, limit)) >= 0:
        if at % _WIDTH == 0:
            return (at + len(end)) // _WIDTH
        limit = at + len(end) - 1  # between two items: no occurrence
    return None


# Name in `engine.speculate` → drafter that needs no other level.
DRAFTERS: Mapping[str, Callable[[], Drafter]] = {"lookup": LookupDrafter}
