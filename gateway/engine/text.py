"""Tokens to text as they come: whole UTF-8 characters only, and nothing that may be a stop string.

Owns the text of one sequence. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, hence tokens that can make up one character
_CONTEXT = 6  # tokens before the window that decide about a leading space


class Detokenizer:
    """Incremental decoding by the difference of two decodings of a short window of tokens.

    The window starts at tokens already shown, so that what depends on the neighbour to the left (a
    sentencepiece's leading space, a byte sequence in progress) comes out as in the whole text.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt[-_CONTEXT:])
        self._shown_tokens = len(self._window)
        self._shown = decode(self._window) if self._window else ""

    def push(self, token: int) -> str:
        """Take one token; the text it completes, "" while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._shown_tokens
        if text.endswith(_REPLACEMENT) and pending < _LONGEST_CHARACTER:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        if self._shown_tokens == len(self._window):
            return ""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        shown = self._shown
        if not text.startswith(shown):  # an unfinished character of the prompt was completed
            shown = shown.rstrip(_REPLACEMENT)
        new = text[len(shown) :] if text.startswith(shown) else ""
        del self._window[: max(0, len(self._window) - _CONTEXT)]
        self._shown_tokens = len(self._window)
        self._shown = self._decode(self._window)
        return new


class StopFilter:
    """Cuts the text at the first stop string and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met; then nothing follows)."""
        if not self._stops:
            return text, False
        held = self._held + text
        hits = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            self._held = ""
            return held[: min(hits)], True
        keep = self._could_begin(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[len(text) - size :]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


class TextStream:
    """Detokenizer and stop filter of one sequence."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._filter = StopFilter(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """(text to show now, whether a stop string was met)."""
        return self._filter.push(self._detokenizer.push(token))

    def flush(self) -> tuple[str, bool]:
        """The rest at the end of the sequence, and whether a stop string showed up in it."""
        text, stopped = self._filter.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._filter.flush(), False)
