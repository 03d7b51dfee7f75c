"""What a request wants, once it is checked and tokenised. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gateway.engine.base import SamplingParams
from gateway.policy.budget import Sla


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request, ready to decide on.

    Attributes:
        model, pinned: `docs-17m`, and the level after `@` if one was named.
        prompts: token ids; `echoes` their texts when they are to be repeated in the answer.
        sampling: for one sequence; `max_tokens` is at least 1.
        muted: generate one token and show none (`max_tokens=0`: only the prompt is scored).
        metadata, user: what the caller says of the request, and whom it acts for.
    """

    name: str
    model: str
    pinned: str | None
    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...]
    n: int
    sampling: SamplingParams
    prompt_logprobs: bool
    muted: bool
    stream: bool
    include_usage: bool
    sla: Sla
    metadata: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def seeded(self, i: int) -> SamplingParams:
        """Sampling of the i-th sequence of a prompt: with a seed, each gets its own."""
        if i == 0 or self.sampling.seed is None:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + i) % 2**63)

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.n
