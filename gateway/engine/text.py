"""Tokens to text as they come: whole UTF-8 characters only, and nothing that may be a stop string.

Owns the text of one sequence. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, hence tokens that can make up one character
_CONTEXT = 6  # tokens before the window that decide about a leading space
_LONGEST_WINDOW = 64  # tokens kept at most of what is shown


class Detokenizer:
    """Incremental decoding by the difference of two decodings of a short window of tokens.

    The window starts at tokens already shown, so that what depends on the neighbour to the left (a
    sentencepiece's leading space, a byte sequence in progress) comes out as in the whole text.
    """

    def __init__(
        self, decode: Decode, prompt: Sequence[int] = (), pieces: dict[int, str] | None = None
    ) -> None:
        """`pieces`, shared by all sequences of a tokenizer, gathers the texts of tokens that have
        one text after any whole text; None where a token's text depends on its neighbours."""
        self._decode = decode
        self._pieces = pieces
        self._window = list(prompt[-_CONTEXT:])
        self._shown_tokens = len(self._window)
        self._shown: str | None = decode(self._window) if self._window else ""
        self._whole = self._is_whole(self._shown or "")

    def _is_whole(self, text: str) -> bool:
        """Whether all is shown, and something is, and no character of it is unfinished."""
        return self._pieces is not None and bool(text) and not text.endswith(_REPLACEMENT)

    def push(self, token: int) -> str:
        """Take one token; the text it completes, "" while a character is unfinished."""
        window = self._window
        window.append(token)
        if self._whole:
            assert self._pieces is not None, "else nothing is whole"
            piece = self._pieces.get(token)
            if piece is not None:
                self._shown_tokens += 1
                self._shown = None
                if len(window) > _LONGEST_WINDOW:
                    self._trim()
                return piece
        return self._push_slowly(token)

    def _push_slowly(self, token: int) -> str:
        before = self._shown_text()
        text = self._decode(self._window)
        pending = len(self._window) - self._shown_tokens
        was_whole, self._whole = self._whole, False
        if text.endswith(_REPLACEMENT) and pending < _LONGEST_CHARACTER:
            return ""
        new = self._show(text, before)
        if was_whole and self._pieces is not None and _REPLACEMENT not in new:
            self._pieces[token] = new
        self._whole = self._is_whole(text)
        return new

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        if self._shown_tokens == len(self._window):
            return ""
        return self._show(self._decode(self._window), self._shown_text())

    def _shown_text(self) -> str:
        """What the shown part of the window decodes to."""
        if self._shown is None:
            extra = self._shown_tokens - _CONTEXT
            if extra > 0:
                del self._window[:extra]
                self._shown_tokens = _CONTEXT
            self._shown = self._decode(self._window[: self._shown_tokens])
        return self._shown

    def _show(self, text: str, shown: str) -> str:
        if not text.startswith(shown):  # an unfinished character of the prompt was completed
            shown = shown.rstrip(_REPLACEMENT)
        new = text[len(shown) :] if text.startswith(shown) else ""
        self._shown_tokens = len(self._window)
        self._shown = None
        return new

    def _trim(self) -> None:
        del self._window[:-_CONTEXT]
        self._shown_tokens = len(self._window)


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

    def __init__(
        self,
        decode: Decode,
        prompt: Sequence[int],
        stops: Sequence[str],
        pieces: dict[int, str] | None = None,
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt, pieces)
        self._filter = StopFilter(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """(text to show now, whether a stop string was met)."""
        return self._filter.push(self._detokenizer.push(token))

    def flush(self) -> tuple[str, bool]:
        """The rest at the end of the sequence, and whether a stop string showed up in it."""
        text, stopped = self._filter.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._filter.flush(), False)
