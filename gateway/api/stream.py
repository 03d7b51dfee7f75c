"""Turns token events into the bytes of one event stream. Formatting only; sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gateway.api.sse import DONE, Choice, Shape
from gateway.engine.base import TokenEvent

Facts = Callable[[], dict[str, Any]]


class Stream:
    """One answer as server-sent events.

    The last chunk carries `compression`: the usage chunk when usage is asked for, else the chunk
    that ends the last choice.
    """

    def __init__(
        self, shape: Shape, choices: Sequence[Choice], *, muted: bool, usage: Facts | None
    ) -> None:
        """`muted`: the generated tokens are not shown; `usage` is None when not asked for."""
        self._shape = shape
        self._choices = choices
        self._muted = muted
        self._usage = usage
        self._opened: set[int] = set()
        self._left = len(choices)

    def feed(self, index: int, event: TokenEvent, compression: Facts) -> bytes:
        """What to send for one event of choice `index`; may be nothing."""
        choice = self._choices[index]
        choice.add(event)
        data = b""
        if index not in self._opened:
            self._opened.add(index)
            data = self._shape.opening(choice)
        if self._muted:
            event = replace(event, text="", logprob=None)
        if event.finish_reason is None:
            if event.text or event.logprob is not None:
                data += self._shape.chunk(choice, event, None)
            return data
        self._left -= 1
        if self._muted:
            choice.mute()
            event = replace(event, finish_reason="length")
        last = self._left == 0 and self._usage is None
        extra = {"compression": compression()} if last else None
        return data + self._shape.chunk(choice, event, extra)

    def end(self, compression: Facts) -> bytes:
        """What to send when every choice has finished."""
        if self._usage is None:
            return DONE
        return self._shape.closing({"usage": self._usage(), "compression": compression()}) + DONE
