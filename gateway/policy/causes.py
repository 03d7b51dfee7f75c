"""What takes time while a request is served, cause by cause, before anything is learned.

A model of this engine: levels take turns on the same cores, a turn being one step of every level
that has work; prompts are prefilled in chunks between turns, after the prompts before them; a level
with all its slots taken makes newcomers wait for the end of a sequence. Sequences that run now end
during a long answer and others arrive. Plain numbers of one level at a time; `present` spreads them
over a ladder. Every cause is non-negative, in ms, and never falls when load is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

CHUNK_TOKENS: Final = 256  # prompt tokens between two turns of other work on the same cores
BLOCK_TOKENS: Final = 16  # of a KV block
SLOTS: Final = 16  # sequences that a level decodes at once when its facts do not say
_UNSEEN: Final = 0.5  # share of an answer that one just begun elsewhere goes on beside it
_FULLEST: Final = 0.9  # share of the cores that arrivals are taken to need at most

# Weights before anything was learned. What the host does per token and per request besides the
# model is not on a card: it is learned from nothing.
TTFT_PRIOR: Final = (0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.1)
TPOT_PRIOR: Final = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.1)
TTFT_MOST: Final = (500.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 500.0, 20.0)
TPOT_MOST: Final = (20.0, 20.0, 20.0, 20.0, 50.0, 20.0, 20.0, 20.0)


class FirstToken(NamedTuple):
    """Of the time to first token: the host's own work; the prompt; the prompts before it at its
    level; those of other levels; turns of decoding between its chunks, and their sequences; turns
    to wait for a slot, and their sequences; requests on their way to an engine; builds."""

    host: float
    prompt: float
    queue: float
    beside: float
    turns: float
    streams: float
    slot_turns: float
    slot_streams: float
    unseen: float
    builds: float


class Token(NamedTuple):
    """Of the time per token: a step of its own; steps of other levels; what more sequences add to
    steps; the host's work per sequence and per token; arrivals; queued prompts; builds."""

    own: float
    others: float
    batches: float
    streams: float
    host: float
    arrivals: float
    prompts: float
    builds: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What usually comes in, over the whole host: requests per ms, and of one of them the tokens
    generated and the ms of prefill."""

    per_ms: float = 0.0
    tokens: float = 0.0
    prefill_ms: float = 0.0

    def pressure(self, tokens: float, slope_ms: float) -> float:
        """How much longer steps get, relative to now, by what arrives during `tokens` steps: a
        sequence that arrives stays until its end and adds `slope_ms` to every step; the longer
        steps get, the more arrive."""
        if not self.per_ms:
            return 0.0
        life = self.tokens or tokens
        stay = tokens / 2.0 if tokens <= life else life * (1.0 - life / (2.0 * tokens))
        share = min(_FULLEST, self.per_ms * (slope_ms * stay + self.prefill_ms))
        return share / (1.0 - share)


@dataclass(slots=True)
class Busy:
    """A level with work: what its engine said, in ms of its card.

    `left`: mean tokens that each of its sequences still generates; inf: unknown. `unseen`: requests
    that hold it and are not in its engine's numbers yet. `batch`: what batches of 0, 1, 2 … as many
    as it has slots add to a step of one, one more at the end.
    """

    running: int
    sequences: int
    left: float
    unseen: int
    slots: int
    queue_ms: float
    queue_tokens: int
    kv_free: float
    decoding_ms: float
    alone_ms: float
    batch: Sequence[float]

    def beside(self, tokens: float) -> Beside:
        """What of it runs beside an answer of `tokens`, on average."""
        ratio, slots, batch = self.left / tokens, self.slots, self.batch
        stay = self.sequences * (ratio if ratio <= 0.5 else 1.0 - 0.25 / ratio)
        company = (stay if stay < slots else float(slots)) + _UNSEEN * self.unseen
        steps = self.alone_ms if company >= 1.0 else company * self.alone_ms
        # What a batch adds to a step of one; between two sizes it is interpolated.
        low = int(company)
        if low >= slots:
            return Beside(company, steps, batch[slots], batch[slots])
        below, share, next_ = batch[low], company - low, batch[low + 1]
        more = below + share * (next_ - below)
        if low + 1 >= slots:
            return Beside(company, steps, more, batch[slots])
        joined = 1.0 + company
        share = joined - (low + 1)
        return Beside(company, steps, more, next_ + share * (batch[low + 2] - next_))

    def rounds(self, prompt_tokens: int) -> float:
        """Turns until a newcomer gets a slot and KV blocks; 0 when there are some."""
        missing = self.sequences + 1 - self.slots
        if missing <= 0 and self.kv_free * BLOCK_TOKENS >= prompt_tokens:
            return 0.0
        if not self.sequences or self.left == math.inf:
            return 0.0
        return max(1, missing) * self.left / max(1, min(self.running, self.slots))


class Beside(NamedTuple):
    """What of a level runs beside an answer: sequences, its steps of one (ms), what its batch adds,
    and what its batch adds when the answer is in it."""

    company: float
    steps_ms: float
    batch_ms: float
    joined_ms: float


class Host(NamedTuple):
    """The whole host at one moment, for an answer of so many tokens.

    Of the ladder's levels together: `others_ms` their steps of one, `batches_ms` what their batches
    add, `streams` their sequences, all averaged over the answer; `turn_ms`, `running`: a turn of
    decoding now; `queue_ms`: prompts not yet prefilled; `unseen`: requests on their way.
    """

    others_ms: float = 0.0
    batches_ms: float = 0.0
    streams: float = 0.0
    turn_ms: float = 0.0
    running: int = 0
    queue_ms: float = 0.0
    queue_tokens: int = 0
    unseen: int = 0

    @classmethod
    def of(cls, levels: Iterable[Busy], beside: Iterable[Beside]) -> Host:
        others = batches = streams = turn = queue = 0.0
        running = tokens = unseen = 0
        for busy, (company, steps_ms, batch_ms, _) in zip(levels, beside, strict=True):
            others += steps_ms
            batches += batch_ms
            streams += company
            turn += busy.decoding_ms
            running += busy.running
            queue += busy.queue_ms
            tokens += busy.queue_tokens
            unseen += busy.unseen
        return cls(others, batches, streams, turn, running, queue, tokens, unseen)


NOBODY: Final = Host()
