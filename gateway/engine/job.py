"""One request inside the engine: its tokens, what sampling and text remember of it, its events.

Decides when the request's output is over; knows nothing of blocks, batches or other requests.
"""

from __future__ import annotations

from torch import Tensor

from gateway.engine.base import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from gateway.engine.grammar import Matcher
from gateway.engine.sampler import RowState, Scored, score
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.text import TextStream
from gateway.engine.tokenizer import Tokenizer


class Job:
    """One request inside the engine."""

    def __init__(
        self,
        variant: str,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        matcher: Matcher | None = None,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.seq = Tokens(
            variant=variant,
            prompt_length=len(request.prompt),
            max_tokens=sampling.max_tokens,
            tokens=list(request.prompt),
            no_reuse=request.prompt_logprobs,
        )
        self.row = RowState(sampling, request.prompt, matcher)
        self.text = TextStream(tokenizer.decode, request.prompt, sampling.stop, tokenizer.pieces)
        self.prompt_scores = [Scored(request.prompt[0])] if request.prompt_logprobs else []
        self._tokenizer = tokenizer
        self._ends = frozenset() if sampling.ignore_eos else tokenizer.eos_ids

    @property
    def scoring(self) -> bool:
        """Prompt tokens are still to be scored."""
        return self.request.prompt_logprobs and len(self.prompt_scores) < self.seq.prompt_length

    def take(self, scored: Scored) -> TokenEvent:
        """The event of the token that the sequence just got; says whether it was the last."""
        self.row.accept(scored.token)
        text, finish = self._advance_text(scored.token)
        if self.seq.known > 1 and self.request.sampling.logprobs is None:
            return TokenEvent(text, scored.token, None, finish)
        return self._full_event(scored, text, finish)

    def _full_event(self, scored: Scored, text: str, finish: FinishReason | None) -> TokenEvent:
        tokenizer, first = self._tokenizer, self.seq.known == 1
        logprob = None
        if self.request.sampling.logprobs is not None:
            logprob = _logprob(tokenizer, scored)
        return TokenEvent(
            text=text,
            token=scored.token,
            logprob=logprob,
            finish_reason=finish,
            cached_tokens=self.seq.cached if first else 0,
            prompt_logprobs=(
                tuple(_logprob(tokenizer, s) for s in self.prompt_scores)
                if first and self.request.prompt_logprobs
                else None
            ),
        )

    def _advance_text(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self._ends:
            return self.text.flush()[0], "stop"
        text, stopped = self.text.push(token)
        if stopped:
            return text, "stop"
        done = self.row.matcher is not None and self.row.matcher.done
        if done or self.seq.known >= self.seq.max_tokens:
            rest, stopped = self.text.flush()
            return text + rest, "stop" if stopped or done else "length"
        return text, None

    def score_prompt(self, chunk: Chunk, rows: Tensor) -> None:
        """Score the prompt tokens that follow the chunk's positions; `rows` is [length, vocab]."""
        stop = min(chunk.start + chunk.length + 1, self.seq.prompt_length)
        targets = self.seq.tokens[chunk.start + 1 : stop]
        # After a preemption the prompt runs again, in other chunks: skip what is scored already.
        known = len(self.prompt_scores) - (chunk.start + 1)
        if 0 <= known < len(targets):
            top = self.request.sampling.logprobs or 0
            self.prompt_scores += score(rows[known : len(targets)], targets[known:], top)


def _logprob(tokenizer: Tokenizer, scored: Scored) -> TokenLogprob:
    return TokenLogprob(
        token=scored.token,
        text=tokenizer.token_text(scored.token),
        logprob=scored.logprob,
        top=tuple((t, tokenizer.token_text(t), p) for t, p in scored.top),
    )
