"""Measure how fast variants run on this host, side by side through the engine that serves them.

Variants alternate inside every round and medians are taken, so that a noisy machine disturbs all of
them alike; ratios are to be trusted more than absolute rates.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass

from gateway.engine.base import Engine, GenerationRequest, SamplingParams

BATCHES = (1, 8)
_ROUNDS = 3
_PROMPT = 16
_DECODE = 32
_PREFILL = 512


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over rounds. `decode_tokens_per_s[b]`: all `b` sequences together, after prefill."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[str, float]


async def measure_speed(
    engines: Mapping[str, Engine], *, vocab_size: int, context_length: int, seed: int = 0
) -> dict[str, Speed]:
    """Prefill and decode rates of every engine, measured in turn in the same minutes.

    Args:
        context_length: bounds the prefill prompt; the engines must hold 8 sequences of 48 tokens.
    """
    rng = random.Random(seed)  # noqa: S311 - prompts, not secrets
    prompt_tokens = min(_PREFILL, context_length - 2)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for round_index in range(_ROUNDS + 1):
        for name, engine in engines.items():
            found = {"prefill": await _prefill_rate(engine, rng, vocab_size, prompt_tokens)}
            for batch in BATCHES:
                found[str(batch)] = await _decode_rate(engine, rng, vocab_size, batch)
            if round_index == 0:
                continue  # the first round warms caches and lazy initialisation
            for key, rate in found.items():
                rates[name].setdefault(key, []).append(rate)
    return {
        name: Speed(
            prefill_tokens_per_s=statistics.median(found["prefill"]),
            decode_tokens_per_s={str(b): statistics.median(found[str(b)]) for b in BATCHES},
        )
        for name, found in rates.items()
    }


async def _prefill_rate(engine: Engine, rng: random.Random, vocab: int, tokens: int) -> float:
    began = time.perf_counter()
    await _token_times(engine, _request(rng, vocab, tokens, 1))
    return tokens / (time.perf_counter() - began)


async def _decode_rate(engine: Engine, rng: random.Random, vocab: int, batch: int) -> float:
    """Tokens per second of the batch from the moment the last sequence has its first token."""
    times = await asyncio.gather(
        *(_token_times(engine, _request(rng, vocab, _PROMPT, _DECODE)) for _ in range(batch))
    )
    start = max(sequence[0] for sequence in times)
    stop = max(sequence[-1] for sequence in times)
    made = sum(sum(1 for moment in sequence if moment > start) for sequence in times)
    return made / max(stop - start, 1e-9)


def _request(rng: random.Random, vocab: int, prompt: int, new: int) -> GenerationRequest:
    return GenerationRequest(
        id=f"measure-{uuid.uuid4().hex[:8]}",
        prompt=tuple(rng.randrange(vocab) for _ in range(prompt)),
        sampling=SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True),
    )


async def _token_times(engine: Engine, request: GenerationRequest) -> list[float]:
    times = []
    async with aclosing(engine.generate(request)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.token is not None:
                times.append(time.perf_counter())
    return times
