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
from gateway.engine.host_acceptance import Shares
from gateway.engine.runners import StepRunner
from gateway.engine.sampler import RowState
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
        """How many tokens it can propose after `seq` now."""
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

    def most(self, seq: Tokens, row: RowState) -> int:
        """See `Drafter.most`."""
        return self._MOST

    def propose(
        self, batch: Sequence[Tokens], rows: Sequence[RowState], counts: Sequence[int]
    ) -> Draft:
        """See `Drafter.propose`. Token by token, greedy rows by their best, others drawn."""
        tokens: list[list[int]] = [[] for _ in batch]
        seen = [row.counts.copy() if row.penalised else None for row in rows]
        sampled = any(row.random for row in rows)
        shares: list[list[Shares]] = [[] for _ in batch]
        probs: Tensor | None = None
        try:
            for step in range(max(counts)):
                active = [i for i, count in enumerate(counts) if count > step]
                logits = self._runner.decode([batch[i] for i in active])
                if logits.device.type == "cpu":
                    places = [shares[i] for i in active]
                    drawn = _next_on_host(logits, [rows[i] for i in active], places)
                else:
                    if sampled and probs is None:
                        shape = (len(batch), max(counts), logits.shape[1])
                        probs = torch.zeros(shape, dtype=logits.dtype, device=logits.device)
                    drawn, found = _next(logits, [rows[i] for i in active])
                    if probs is not None and found is not None:
                        probs[torch.tensor(active, device=logits.device), step] = found
                for i, token in zip(active, drawn, strict=True):
                    tokens[i].append(token)
                    batch[i].tokens.append(token)
                    if rows[i].penalised:
                        rows[i].counts[token] += 1
        finally:
            for seq, row, made, before in zip(batch, rows, tokens, seen, strict=True):
                del seq.tokens[len(seq.tokens) - len(made) :]
                if before is not None:
                    row.counts = before
        return Draft(tokens, shares if sampled and probs is None else probs)


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


def _next(logits: Tensor, rows: Sequence[RowState]) -> tuple[list[int], Tensor | None]:
    """A token per row, and what it was drawn from (zeros for greedy rows; None: all are)."""
    logits = adjusted(logits, rows)
    tokens = logits.argmax(-1)
    chosen = [i for i, row in enumerate(rows) if row.random]
    if not chosen:
        return tokens.tolist(), None
    index = torch.tensor(chosen, device=logits.device)
    probs = torch.zeros_like(logits)
    probs[index] = distributions(logits[index], [rows[i].params for i in chosen])
    uniform = [rows[i].draw() for i in chosen]
    drawn = torch.tensor(uniform, dtype=torch.float64, device=logits.device)
    tokens[index] = draw(probs[index], drawn)
    return tokens.tolist(), probs


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
        text.extend(seq.tokens[len(text) :])
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
