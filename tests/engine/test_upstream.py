"""The upstream engine against a real OpenAI-compatible server: our own gateway on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway.engine.base import (
    BadPrompt,
    EngineFailed,
    EngineOverloaded,
    GenerationRequest,
    SamplingParams,
    SequenceFailed,
    TokenEvent,
)
from gateway.engine.fake import FakeEngine, FakeSpeed, FakeTokenizer
from gateway.engine.upstream import UNKNOWN_TOKEN, UpstreamEngine
from tests.support.fake_pool import MODEL, Gateway
from tests.support.live import LiveServer

PROMPT = tuple(FakeTokenizer().encode("hello"))


def request(max_tokens: int = 8, *, score: bool = False, **sampling: Any) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, SamplingParams(max_tokens, **sampling), score)


async def collect(engine: UpstreamEngine | FakeEngine, r: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(r)]


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def tokens(events: list[TokenEvent]) -> int:
    return sum(event.token is not None for event in events)


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture(scope="module")
def server(gateway: Gateway) -> Iterator[LiveServer]:
    with LiveServer(gateway.open) as server:
        yield server


@pytest.fixture
async def engine(server: LiveServer) -> AsyncIterator[UpstreamEngine]:
    engine = UpstreamEngine(server.url, MODEL)
    yield engine
    await engine.close()


@pytest.mark.parametrize("as_text", [False, True], ids=["ids", "text"])
async def test_gives_what_the_engine_behind_gives(server: LiveServer, as_text: bool) -> None:
    decode = FakeTokenizer().decode if as_text else None
    engine = UpstreamEngine(f"{server.url}/v1", MODEL, decode=decode)
    wanted = request(20, seed=4)
    got = await collect(engine, wanted)
    direct = await collect(FakeEngine(FakeSpeed(tpot_ms=0.0)), wanted)
    assert text(got) == text(direct)
    assert tokens(got) == 20
    assert got[-1].finish_reason == "length"
    assert engine.stats().running == engine.stats().waiting == 0
    await engine.close()


async def test_sampling_arrives_unchanged(engine: UpstreamEngine, gateway: Gateway) -> None:
    sampling = SamplingParams(
        max_tokens=4, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=5, stop=("q",),
        logprobs=2, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5,
        logit_bias={3: 1.0}, ignore_eos=True,
    )  # fmt: skip
    await collect(engine, GenerationRequest("r", PROMPT, sampling))
    assert gateway.backend.seen[-1].sampling == sampling
    assert gateway.backend.seen[-1].prompt == PROMPT
    schema = '{"type":"object"}'
    answer = await collect(engine, request(30, json_schema=schema))
    assert gateway.backend.seen[-1].sampling.json_schema == schema
    assert answer[-1].finish_reason == "stop"


async def test_logprobs_come_with_their_tokens(engine: UpstreamEngine) -> None:
    got = await collect(engine, request(5, logprobs=2))
    scored = [event.logprob for event in got if event.logprob]
    assert len(scored) == 5
    assert "".join(entry.text for entry in scored) == text(got)
    assert all(len(entry.top) == 2 for entry in scored)


async def test_prompt_scores(engine: UpstreamEngine) -> None:
    got = await collect(engine, request(2, score=True, logprobs=1))
    scored = got[0].prompt_logprobs
    assert scored is not None
    assert tuple(entry.token for entry in scored) == PROMPT
    assert scored[0].logprob is None
    assert all(entry.logprob == pytest.approx(-0.1) for entry in scored[1:])
    assert tokens(got) == 2
    assert got[-1].finish_reason == "length"


async def test_closing_the_iterator_stops_the_server_s_work() -> None:
    gateway = Gateway(speed=FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=10))
    with LiveServer(gateway.open) as server:
        engine = UpstreamEngine(server.url, MODEL)
        async with aclosing(engine.generate(request(4000))) as events:  # type: ignore[type-var]
            await anext(events)
            assert not gateway.idle()
            assert engine.stats().running == 1
            assert engine.stats().remaining_tokens == 3999
        async with asyncio.timeout(10):
            while not gateway.idle():  # noqa: ASYNC110 - another thread's state
                await asyncio.sleep(0.005)
        assert engine.stats().running == 0
        await engine.close()


async def test_a_broken_engine_behind_is_a_failed_engine() -> None:
    gateway = Gateway()
    with LiveServer(gateway.open) as server:
        engine = UpstreamEngine(server.url, MODEL)
        for when in (0, 3):
            gateway.backend.fault = lambda _, done, when=when: (
                EngineFailed("boom") if done == when else None
            )
            with pytest.raises((SequenceFailed, EngineOverloaded)):
                await collect(engine, request())
        gateway.backend.fault = None
        assert tokens(await collect(engine, request(3))) == 3
        await engine.close()


async def test_nobody_listening_is_a_failed_engine() -> None:
    engine = UpstreamEngine("http://127.0.0.1:9", MODEL)
    with pytest.raises(EngineFailed, match="ConnectError"):
        await collect(engine, request())
    await engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        await collect(engine, request())


# -- servers that misbehave ---------------------------------------------------------------------


@asynccontextmanager
async def stand_in(answer: Callable[[], Response]) -> AsyncIterator[ASGIApp]:
    async def endpoint(_: Request) -> Response:
        return answer()

    yield Starlette(routes=[Route("/v1/completions", endpoint, methods=["POST"])])


def sse(*lines: str) -> Callable[[], Response]:
    async def body() -> AsyncIterator[str]:
        for line in lines:
            yield line + "\n\n"

    return lambda: StreamingResponse(body(), media_type="text/event-stream")


def plain(status: int, body: Any) -> Callable[[], Response]:
    return lambda: JSONResponse(body, status)


CHUNK = 'data: {"choices":[{"index":0,"text":"hi there","finish_reason":null}]}'
LAST = 'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}'


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        pytest.param(
            plain(429, {"error": {"message": "full"}}), EngineOverloaded, "full", id="429"
        ),
        pytest.param(plain(503, {"detail": "soon"}), EngineOverloaded, "soon", id="503"),
        pytest.param(plain(400, {"error": "no"}), BadPrompt, "no", id="400"),
        pytest.param(plain(422, {"detail": "no"}), BadPrompt, "no", id="422"),
        pytest.param(plain(404, {"error": "no"}), SequenceFailed, "no", id="404"),
        pytest.param(plain(500, {"error": "no"}), SequenceFailed, "no", id="500"),
        pytest.param(
            plain(400, {"error": {"message": "who?", "param": "model"}}),
            SequenceFailed,
            "who",
            id="400-model",
        ),
        pytest.param(lambda: Response("<html>", 502), SequenceFailed, "502", id="proxy-page"),
        pytest.param(plain(200, {"x": 1}), SequenceFailed, "finish_reason", id="not-a-stream"),
        pytest.param(sse("data: {"), SequenceFailed, "not JSON", id="broken-event"),
        pytest.param(sse("data: []"), SequenceFailed, "not an object", id="odd-event"),
        pytest.param(sse(CHUNK), SequenceFailed, "finish_reason", id="cut-off"),
        pytest.param(
            sse(CHUNK, 'data: {"error":{"message":"oom"}}'), SequenceFailed, "oom", id="error-event"
        ),
    ],
)
async def test_bad_answers(
    answer: Callable[[], Response], error: type[Exception], says: str
) -> None:
    with LiveServer(lambda: stand_in(answer)) as server:
        engine = UpstreamEngine(server.url, MODEL)
        with pytest.raises(error, match=says):
            await collect(engine, request())
        assert engine.stats().running == engine.stats().waiting == 0
        await engine.close()


@pytest.mark.parametrize(
    ("param", "named"), [("min_p", "min_p"), (None, "prompt"), ("zzz", "prompt"), ([], "prompt")]
)
async def test_the_field_that_the_server_refuses_is_kept(param: object, named: str) -> None:
    answer = plain(400, {"error": {"message": "no", "param": param}})
    with LiveServer(lambda: stand_in(answer)) as server:
        engine = UpstreamEngine(server.url, MODEL)
        with pytest.raises(BadPrompt) as caught:
            await collect(engine, request(min_p=0.1))
        assert caught.value.param == named
        await engine.close()


async def test_tokens_that_share_a_chunk_are_counted_by_the_server_s_usage() -> None:
    usage = 'data: {"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":5}}'
    with LiveServer(lambda: stand_in(sse(CHUNK, LAST, usage, "data: [DONE]"))) as server:
        engine = UpstreamEngine(server.url, MODEL)
        got = await collect(engine, request())
        assert text(got) == "hi there"
        assert tokens(got) == 3
        assert {event.token for event in got} == {UNKNOWN_TOKEN, None}
        assert [event.finish_reason for event in got][-1] == "stop"
        await engine.close()


async def test_scoring_by_a_server_without_logprobs_fails_clearly() -> None:
    answer = plain(200, {"choices": [{"text": "hello", "finish_reason": "length"}]})
    with LiveServer(lambda: stand_in(answer)) as server:
        engine = UpstreamEngine(server.url, MODEL)
        with pytest.raises(SequenceFailed, match="logprobs"):
            await collect(engine, request(score=True, logprobs=0))
        await engine.close()
