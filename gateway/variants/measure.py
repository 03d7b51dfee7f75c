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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from gateway.engine.base import Engine, GenerationRequest, SamplingParams
from gateway.variants.card import Speculation

BATCHES = (1, 8)
_ROUNDS = 3
_PROMPT = 16
_DECODE = 32
_PREFILL = 512
_DRAFTED = 64  # tokens of an answer when drafts are timed
OFF = "off"


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
                asked = [_request(rng, vocab_size, _PROMPT, _DECODE) for _ in range(batch)]
                found[str(batch)] = await _decode_rate(engine, asked)
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


async def measure_speculation(
    engine: Engine,
    use: Callable[[str], Awaitable[None]],
    drafters: Sequence[str],
    prompts: Sequence[Sequence[int]],
) -> Speculation:
    """Decode rates of an engine with the best of `drafters` and without, in turn.

    Args:
        use: lets a drafter draft from now on, or nobody (`OFF`).
        prompts: beginnings of real texts: how much of a draft is kept depends on them.
    """
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in (OFF, *drafters)}
    counts = {name: [0, 0] for name in rates}
    for round_index in range(_ROUNDS + 1):
        for name, found in rates.items():
            await use(name)
            before = engine.stats()
            for batch in BATCHES:
                chosen = [prompts[(round_index + i) % len(prompts)] for i in range(batch)]
                asked = [_greedy(prompt, _DRAFTED) for prompt in chosen]
                rate = await _decode_rate(engine, asked)
                if round_index:
                    found.setdefault(str(batch), []).append(rate)
            after = engine.stats()
            counts[name][0] += after.drafted_tokens - before.drafted_tokens
            counts[name][1] += after.accepted_tokens - before.accepted_tokens
    await use(OFF)
    medians = {
        name: {batch: statistics.median(seen) for batch, seen in found.items()}
        for name, found in rates.items()
    }
    best = max(drafters, key=lambda name: medians[name]["1"])
    return Speculation(
        drafter=best,
        acceptance=counts[best][1] / max(counts[best][0], 1),
        decode_tokens_per_s=medians[best],
        plain_tokens_per_s=medians[OFF],
    )


async def _prefill_rate(engine: Engine, rng: random.Random, vocab: int, tokens: int) -> float:
    began = time.perf_counter()
    await _token_times(engine, _request(rng, vocab, tokens, 1))
    return tokens / (time.perf_counter() - began)


async def _decode_rate(engine: Engine, requests: Sequence[GenerationRequest]) -> float:
    """Tokens per second of the batch from the moment the last sequence has its first token."""
    times = await asyncio.gather(*(_token_times(engine, request) for request in requests))
    start = max(sequence[0] for sequence in times)
    stop = max(sequence[-1] for sequence in times)
    made = sum(sum(1 for moment in sequence if moment > start) for sequence in times)
    return made / max(stop - start, 1e-9)


def _request(rng: random.Random, vocab: int, prompt: int, new: int) -> GenerationRequest:
    return _greedy([rng.randrange(vocab) for _ in range(prompt)], new)


def _greedy(prompt: Sequence[int], new: int) -> GenerationRequest:
    return GenerationRequest(
        id=f"measure-{uuid.uuid4().hex[:8]}",
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True),
    )


async def _token_times(engine: Engine, request: GenerationRequest) -> list[float]:
    times = []
    async with aclosing(engine.generate(request)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.token is not None:
                times.append(time.perf_counter())
    return times
