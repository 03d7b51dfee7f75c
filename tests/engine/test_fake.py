"""The stand-in engine keeps the engine protocol's promises."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.base import (
    EngineFailed,
    EngineOverloaded,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from gateway.engine.fake import FakeEngine, FakeSpeed, FakeTokenizer, StopFilter

INSTANT = FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=0.0)


def request(prompt: str = "hello", max_tokens: int = 8, **sampling: object) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return GenerationRequest("r", tuple(FakeTokenizer().encode(prompt)), params)


async def collect(engine: FakeEngine, wanted: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(wanted)]


async def text_of(engine: FakeEngine, wanted: GenerationRequest) -> str:
    return "".join(event.text for event in await collect(engine, wanted))


async def test_text_depends_on_prompt_and_seed_only() -> None:
    one, two = FakeEngine(INSTANT), FakeEngine(INSTANT)
    assert await text_of(one, request(seed=1)) == await text_of(two, request(seed=1))
    assert await text_of(one, request(seed=1)) != await text_of(one, request(seed=2))
    assert await text_of(one, request("a")) != await text_of(one, request("b"))
    greedy = request(temperature=0.0, seed=1), request(temperature=0.0, seed=2)
    assert await text_of(one, greedy[0]) == await text_of(one, greedy[1])


async def test_last_event_finishes_and_tokens_are_counted() -> None:
    events = await collect(FakeEngine(INSTANT), request(max_tokens=5))
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"]
    decoded = FakeTokenizer().decode([e.token for e in events if e.token is not None])
    assert decoded == "".join(event.text for event in events)


async def test_eos_after_ends_with_stop_unless_ignored() -> None:
    engine = FakeEngine(FakeSpeed(tpot_ms=0.0, eos_after=3))
    events = await collect(engine, request(max_tokens=50))
    assert (len(events), events[-1].finish_reason) == (4, "stop")
    assert len(await collect(engine, request(max_tokens=50, ignore_eos=True))) == 50


async def test_stop_strings_cut_the_text_and_are_not_shown() -> None:
    engine = FakeEngine(INSTANT)
    whole = await text_of(engine, request(max_tokens=40, seed=3))
    stop = whole[20:26]
    cut = await text_of(engine, request(max_tokens=40, seed=3, stop=(stop,)))
    assert cut == whole[: whole.index(stop)]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
)
def test_stop_filter_equals_cutting_the_whole_text(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    """Pieces of any size; the reference searches everything fed so far."""
    expected, stopped, fed = text, False, 0
    filtered, out = StopFilter(tuple(stops)), ""
    for size in sizes * 30:
        piece = text[fed : fed + size]
        if not piece or stopped:
            break
        fed += len(piece)
        shown, stopped = filtered.push(piece)
        out += shown
        hits = [text[:fed].find(stop) for stop in stops if stop in text[:fed]]
        if hits:
            expected = text[: min(hits)]
            assert stopped
    assert out + ("" if stopped else filtered.flush()) == expected


async def test_closing_the_iterator_frees_the_sequence() -> None:
    engine = FakeEngine(FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=1.0))
    async with aclosing(engine.generate(request(max_tokens=1000))) as events:  # type: ignore[type-var]
        await anext(events)
        stats = engine.stats()
        assert (stats.running, stats.remaining_tokens) == (1, 999)
        assert stats.kv_used_blocks > 0
    assert engine.stats().running == 0
    assert engine.stats().remaining_tokens == 0


async def test_waiting_is_bounded() -> None:
    engine = FakeEngine(FakeSpeed(tpot_ms=1.0, max_running=1, max_waiting=1))
    tasks = [asyncio.create_task(collect(engine, request(max_tokens=200))) for _ in range(2)]
    await asyncio.sleep(0.02)
    assert engine.stats().waiting == 1
    with pytest.raises(EngineOverloaded):
        await collect(engine, request())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert engine.stats().waiting == engine.stats().running == 0


async def test_faults_are_raised_where_asked() -> None:
    engine = FakeEngine(INSTANT, lambda _, done: EngineFailed("boom") if done == 3 else None)
    events = engine.generate(request(max_tokens=10))
    for _ in range(3):
        await anext(events)
    with pytest.raises(EngineFailed, match="boom"):
        await anext(events)
    assert engine.stats().running == 0


async def test_a_closed_engine_refuses_and_breaks_off() -> None:
    engine = FakeEngine(FakeSpeed(tpot_ms=1.0))
    events = engine.generate(request(max_tokens=100))
    await anext(events)
    await engine.close()
    with pytest.raises(EngineFailed):
        await anext(events)
    with pytest.raises(EngineFailed):
        await collect(engine, request())


async def test_prompt_logprobs_come_on_the_first_event() -> None:
    wanted = request("abc", max_tokens=2, logprobs=2)
    wanted = GenerationRequest("r", wanted.prompt, wanted.sampling, prompt_logprobs=True)
    first, second = await collect(FakeEngine(INSTANT), wanted)
    assert first.prompt_logprobs is not None
    assert [entry.text for entry in first.prompt_logprobs] == ["a", "b", "c"]
    assert first.prompt_logprobs[0].logprob is None
    assert all(entry.logprob is not None for entry in first.prompt_logprobs[1:])
    assert second.prompt_logprobs is None
    assert second.logprob is not None
    assert len(second.logprob.top) == 2


async def test_a_schema_yields_a_json_object() -> None:
    text = await text_of(FakeEngine(INSTANT), request(max_tokens=50, json_schema="{}"))
    assert text == '{"answer":"fake"}'


@given(st.text(max_size=40))
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = FakeTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
