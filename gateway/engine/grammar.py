"""JSON schemas as token masks, through llguidance. Torch-free.

Owns the compiled tokenizer trie of one model (made once, about a second for large vocabularies).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.engine.base import BadSchema
from gateway.engine.tokenizer import Tokenizer

_ANY_OBJECT = '{"type": "object"}'


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """bool [tokens]: which tokens may come next."""
        return np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8) > 0

    def accept(self, token: int) -> None:
        """Advance over a sampled token, which `allowed` must have allowed."""
        self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """The text is complete: nothing but the end may follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Compiles schemas for one tokenizer. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._source = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(
            self._source.backend.to_str(),
            n_vocab=self._vocab_size,
            eos_token=sorted(self._source.eos_ids) or None,
        )

    def compile(self, schema: str) -> Matcher:
        """A matcher for the JSON schema in `schema` (`{}`: any JSON object).

        Raises:
            BadSchema: not JSON, not a schema, or something the compiler does not support.
        """
        from llguidance import LLMatcher

        try:
            source = _ANY_OBJECT if schema.strip() == "{}" else schema
            # Compact: free white space lets a weak model pad until its tokens are spent.
            grammar = LLMatcher.grammar_from_json_schema(
                source, defaults={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise BadSchema(str(error)) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise BadSchema(matcher.get_error().splitlines()[0])
        return Matcher(matcher)
