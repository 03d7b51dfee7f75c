"""Workloads: who sends what and when, decided before the first byte is sent. Pure and seeded.

A plan is a finite list of requests. Open-loop plans (Poisson, trace) fix the moment each request is
meant to leave; a server that falls behind cannot slow the plan down, so its queueing is seen
(coordinated omission hides it). Closed-loop plans have no moments: N users each send the next
request when their last one ended.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from loadtest.mix import BadInput, Lengths, Mix, TrafficClass

MAX_REQUESTS = 100_000
MAX_TOKENS = 1_000_000
TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
WORDS = (
    "the of and to in a is that for it as was with be by on not he this are or his from at which "
    "but have an had they you were their one all we can her has there been if more when will "
    "would who so no said what up its about into than them only some could time these two may "
    "then do first any my now such like our over man me even most made after also did many before "
    "must through back years where much your way well down should because each just those people "
    "how too little state good very make world still own see men work long get here between both "
    "life being under never day same"
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a request is meant to leave (seconds after the start; None: when a user is free) and,
    from a trace, how long it is (tokens)."""

    at: float | None
    prompt_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send. `prompt_tokens` is what the prompt aims at; the server's usage says what
    it was."""

    index: int
    at: float | None
    traffic: TrafficClass
    prompt: str
    prompt_tokens: int
    max_tokens: int


def poisson(rate: float, duration: float, requests: int, rng: np.random.Generator) -> list[Arrival]:
    """Open-loop Poisson arrivals: exponential gaps of mean `1/rate` seconds, until `duration`
    seconds or `requests` requests."""
    times = np.cumsum(rng.exponential(1.0 / rate, size=requests))
    return [Arrival(at=float(t)) for t in times[times < duration]]


def constant(rate: float, duration: float, requests: int) -> list[Arrival]:
    """Open-loop arrivals every `1/rate` seconds."""
    count = min(requests, int(np.ceil(rate * duration)))
    return [Arrival(at=i / rate) for i in range(count)]


def closed(requests: int) -> list[Arrival]:
    """Requests for closed-loop users; the client gives each to the next free user."""
    return [Arrival(at=None) for _ in range(requests)]


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How a trace is fitted to a small machine: `time` 2.0 plays it twice as fast; `length` 0.1
    makes prompts and outputs a tenth as long; the caps cut what is still too long (tokens)."""

    time: float = 1.0
    length: float = 1.0
    max_prompt: int = MAX_TOKENS
    max_output: int = MAX_TOKENS


def trace(path: Path, scale: TraceScale, duration: float, requests: int) -> list[Arrival]:
    """Arrivals of an Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens).

    The first row leaves at 0. Rows are sorted by time; lengths are at least one token.

    Raises:
        BadInput: a missing file, a missing column, or a row that cannot be read (named by line).
    """
    rows = sorted(_trace_rows(path, limit=requests))
    if not rows:
        raise BadInput(f"--trace {path}: no rows")
    first = rows[0][0]
    arrivals = (
        Arrival(
            at=(stamp - first) / scale.time,
            prompt_tokens=min(max(1, round(context * scale.length)), scale.max_prompt),
            max_tokens=min(max(1, round(output * scale.length)), scale.max_output),
        )
        for stamp, context, output in rows
    )
    return [a for a in arrivals if a.at is not None and a.at < duration]


def _trace_rows(path: Path, limit: int) -> Iterator[tuple[float, int, int]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [c for c in TRACE_COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise BadInput(f"--trace {path}: no column {', '.join(missing)}")
            for row, _ in zip(reader, range(limit), strict=False):
                try:
                    stamp, context, output = (row[c] for c in TRACE_COLUMNS)
                    yield datetime.fromisoformat(stamp).timestamp(), int(context), int(output)
                except (ValueError, TypeError) as error:
                    raise BadInput(f"--trace {path}, line {reader.line_num}: {error}") from None
    except OSError as error:
        raise BadInput(f"--trace {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"--trace {path}: not a CSV file: {error}") from None


class PromptSource(Protocol):
    """Makes a prompt of about `tokens` tokens; equal generators give equal prompts."""

    def prompt(self, tokens: int, rng: np.random.Generator) -> str: ...


class TextPrompts:
    """Prompts cut out of a text, each from its own random place, so that a prefix cache on the
    server helps no more than it would for unrelated callers.

    `tokens_per_char` turns a token count into characters; `overhead` is what the server's chat
    template adds (tokens). Both are measured by `client.calibrate` where the server reports usage.
    """

    def __init__(self, text: str, *, tokens_per_char: float = 0.25, overhead: float = 0.0) -> None:
        self._text = " ".join(text.split())
        self._tokens_per_char = tokens_per_char
        self._overhead = overhead

    @classmethod
    def from_file(cls, path: Path) -> TextPrompts:
        """Raises: BadInput when the file cannot be read as text or holds fewer than 100 letters."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BadInput(f"--prompts {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise BadInput(f"--prompts {path}: not UTF-8 text: {error}") from None
        if len(text.strip()) < 100:
            raise BadInput(f"--prompts {path}: shorter than 100 characters")
        return cls(text)

    @classmethod
    def from_words(cls, rng: np.random.Generator) -> TextPrompts:
        """A source that needs no file: common English words in random order."""
        return cls(" ".join(rng.choice(WORDS.split(), size=20_000)))

    def scaled(self, tokens_per_char: float, overhead: float) -> TextPrompts:
        """The same text with measured proportions."""
        return TextPrompts(self._text, tokens_per_char=tokens_per_char, overhead=overhead)

    def prompt(self, tokens: int, rng: np.random.Generator) -> str:
        size = max(1, round((tokens - self._overhead) / self._tokens_per_char))
        start = int(rng.integers(len(self._text)))
        start = self._text.find(" ", start) + 1  # begin at a word; 0 when there is none further on
        text = self._text[start:]
        while len(text) < size:
            text += " " + self._text
        return text[:size].strip() or self._text[0]


@dataclass(frozen=True, slots=True)
class DefaultLengths:
    """Lengths of requests whose class and arrival say nothing (tokens)."""

    prompt: Lengths
    output: Lengths


def plan(
    arrivals: Sequence[Arrival],
    mix: Mix,
    prompts: PromptSource,
    lengths: DefaultLengths,
    rng: np.random.Generator,
) -> list[Planned]:
    """Give every arrival a class (drawn by weight), a prompt and an output length."""
    weights = np.array([item.weight for item in mix.classes])
    drawn = rng.choice(len(mix.classes), size=len(arrivals), p=weights / weights.sum())
    planned = []
    for index, (arrival, which) in enumerate(zip(arrivals, drawn, strict=True)):
        traffic = mix.classes[int(which)]
        prompt_tokens = _length(traffic.prompt_tokens, arrival.prompt_tokens, lengths.prompt, rng)
        planned.append(
            Planned(
                index=index,
                at=arrival.at,
                traffic=traffic,
                prompt=prompts.prompt(prompt_tokens, rng),
                prompt_tokens=prompt_tokens,
                max_tokens=_length(traffic.max_tokens, arrival.max_tokens, lengths.output, rng),
            )
        )
    return planned


def _length(
    of_class: Lengths | None, of_arrival: int | None, default: Lengths, rng: np.random.Generator
) -> int:
    if of_class is None and of_arrival is not None:
        return of_arrival
    chosen = of_class or default
    return int(rng.integers(chosen.low, chosen.high + 1))
