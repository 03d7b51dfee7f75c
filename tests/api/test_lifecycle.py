"""However a request ends, nothing stays behind: no sequence, no lease, no permit."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gateway.api.problems import as_pressgate
from gateway.config import Limits
from gateway.engine.base import BadPrompt, EngineFailed, EngineOverloaded, SequenceFailed
from gateway.engine.fake import FakeSpeed
from tests.support.fake_pool import MODEL, Gateway, make_settings
from tests.support.live import LiveServer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
STEP_S = 0.02


@pytest.fixture
def slow() -> Iterator[tuple[Gateway, LiveServer]]:
    """A gateway whose tokens take 20 ms each, in a server of its own."""
    gateway = Gateway(speed=FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=1000 * STEP_S))
    with LiveServer(gateway.open) as server:
        yield gateway, server


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 4000} | fields).encode()


def send(server: LiveServer, raw: bytes) -> socket.socket:
    """Send one request and leave the connection open."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Seconds until the condition holds; fails when it does not."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never happened"
        time.sleep(0.001)
    return time.monotonic() - began


def running(gateway: Gateway) -> int:
    return sum(level.stats.running for level in gateway.pool.snapshot(MODEL).levels)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"stream": True}, id="stream"),
        pytest.param({}, id="whole"),
        pytest.param({"stream": True, "n": 4}, id="stream-of-four"),
        pytest.param({"n": 4}, id="whole-of-four"),
    ],
)
def test_a_hang_up_cancels_the_sequences(
    slow: tuple[Gateway, LiveServer], fields: dict[str, Any]
) -> None:
    gateway, server = slow
    connection = send(server, body(**fields))
    until(lambda: running(gateway) == fields.get("n", 1))
    made_before = gateway.pool.snapshot(MODEL).levels[0].stats.remaining_tokens
    connection.close()
    assert gateway.settles()
    assert made_before > 3000  # it was far from its end by itself
    assert_counted(server, "499")


def assert_counted(server: LiveServer, code: str) -> None:
    scraped = httpx.get(f"{server.url}/metrics").text
    lines = [x for x in scraped.splitlines() if x.startswith("pressgate_requests_total")]
    assert any(f'code="{code}"' in line for line in lines), lines


def test_a_hang_up_while_the_body_is_sent_is_no_error(slow: tuple[Gateway, LiveServer]) -> None:
    gateway, server = slow
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: 500\r\n\r\n{{".encode())
    connection.close()
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert gateway.settles()


def test_two_hundred_aborted_streams_leave_nothing(server: LiveServer, gateway: Gateway) -> None:
    """Aborted at any moment: before the answer, in its head, in its midst."""

    def abort(index: int) -> None:
        with send(server, body(stream=index % 3 > 0, n=1 + index % 2)) as connection:
            for _ in range(index % 4):
                connection.recv(64)

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(abort, range(200)))
    assert gateway.settles()
    answer = httpx.post(f"{server.url}{TEXT}", content=body(max_tokens=2), headers=JSON)
    assert answer.status_code == 200


JSON = {"content-type": "application/json"}


def events(response: httpx.Response) -> list[Any]:
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        pytest.param(EngineFailed("secret detail"), 503, "engine_failed", id="failed"),
        pytest.param(SequenceFailed("secret detail"), 503, "sequence_failed", id="lost"),
        pytest.param(BadPrompt("never fits"), 400, "invalid_value", id="bad-prompt"),
        pytest.param(EngineOverloaded("queue full"), 429, "overloaded", id="overloaded"),
        pytest.param(ValueError("secret detail"), 500, "internal_error", id="bug"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_engine_error_before_the_first_token_is_a_clean_status(
    error: Exception, status: int, code: str, stream: bool, n: int
) -> None:
    gateway = Gateway()
    with LiveServer(gateway.open) as server:
        gateway.backend.fault = lambda _request, _done: error
        raw = body(stream=stream, n=n, max_tokens=5)
        response = httpx.post(f"{server.url}{TEXT}", content=raw, headers=JSON)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert "secret" not in response.text
        if status in (429, 503):
            assert int(response.headers["retry-after"]) >= 1
        assert gateway.settles()
        gateway.backend.fault = None
        response = httpx.post(f"{server.url}{TEXT}", content=raw, headers=JSON)
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "error", "param"),
    [
        (TEXT, {"prompt": "x"}, BadPrompt("no"), "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, BadPrompt("no"), "messages"),
        (TEXT, {"prompt": "x"}, BadPrompt("no", param="min_p"), "min_p"),
    ],
)
def test_a_prompt_that_the_engine_refuses_names_the_caller_s_field(
    path: str, fields: dict[str, Any], error: Exception, param: str
) -> None:
    gateway = Gateway()
    with LiveServer(gateway.open) as server:
        gateway.backend.fault = lambda _request, _done: error
        response = httpx.post(f"{server.url}{path}", json={"model": MODEL} | fields)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["param"] == param


def test_a_lost_sequence_leaves_the_engine_to_the_others() -> None:
    """Another caller's stream goes on through it; a failed engine would have been closed."""
    gateway = Gateway(speed=FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=5))
    with LiveServer(gateway.open) as server, ThreadPoolExecutor(1) as threads:
        url = f"{server.url}{TEXT}"
        raw = body(max_tokens=100)
        other = threads.submit(httpx.post, url, content=raw, headers=JSON, timeout=30)
        until(lambda: running(gateway) == 1)
        gateway.backend.fault = lambda request, _: (
            SequenceFailed("lost") if request.sampling.max_tokens == 7 else None
        )
        lost = httpx.post(url, content=body(max_tokens=7), headers=JSON)
        assert lost.status_code == 503
        assert other.result().status_code == 200
        assert other.result().json()["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "broken-off"])
def test_a_bug_is_logged_once_with_its_traceback(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    gateway = Gateway()
    with LiveServer(gateway.open) as server:
        gateway.backend.fault = lambda _, done: (
            ValueError("secret") if done == (2 if stream else 0) else None
        )
        raw = body(stream=stream, max_tokens=5)
        response = httpx.post(f"{server.url}{TEXT}", content=raw, headers=JSON)
        assert "secret" not in response.text
        assert gateway.settles()
    bugs = [r for r in caplog.records if r.exc_info and isinstance(r.exc_info[1], ValueError)]
    assert [record.levelname for record in bugs] == ["ERROR"]
    assert bugs[0].exc_info is not None
    assert bugs[0].exc_info[2] is not None


def test_every_internal_error_is_an_error_of_its_own() -> None:
    bug = ValueError("secret")
    assert as_pressgate(bug) is not as_pressgate(bug)


@pytest.mark.parametrize("error", [EngineFailed("secret"), ValueError("secret")], ids=repr)
@pytest.mark.parametrize("n", [1, 3])
def test_an_error_within_a_stream_is_an_event_in_openai_s_shape(error: Exception, n: int) -> None:
    gateway = Gateway()
    with LiveServer(gateway.open) as server:
        gateway.backend.fault = lambda _request, done: error if done == 3 else None
        raw = body(stream=True, n=n, max_tokens=9)
        response = httpx.post(f"{server.url}{TEXT}", content=raw, headers=JSON)
        assert response.status_code == 200
        got = events(response)
        assert got[-1] == "[DONE]"
        assert {"message", "type", "param", "code"} <= set(got[-2]["error"])
        assert len([e for e in got[:-2] if e["choices"][0]["text"]]) >= 3
        assert "secret" not in response.text
        assert gateway.settles()


def test_a_request_over_its_time_is_stopped() -> None:
    limits = Limits(request_timeout_seconds=0.3)
    slow = FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=20)
    gateway = Gateway(make_settings(limits=limits), speed=slow)
    with LiveServer(gateway.open) as server:
        url = f"{server.url}{TEXT}"
        whole = httpx.post(url, content=body(), headers=JSON)
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "timeout"
        streamed = events(httpx.post(url, content=body(stream=True), headers=JSON))
        assert streamed[-2]["error"]["code"] == "timeout"
        assert len(streamed) > 5
        assert gateway.settles()


def test_more_than_the_limit_at_once_are_told_when_to_come_back() -> None:
    limits = Limits(max_concurrent=4, max_concurrent_per_key=4)
    slow = FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=20)
    gateway = Gateway(make_settings(limits=limits), speed=slow)
    with LiveServer(gateway.open) as server:
        held = [send(server, body(stream=True)) for _ in range(4)]
        until(lambda: running(gateway) == 4)
        refused = httpx.post(f"{server.url}{TEXT}", content=body(), headers=JSON)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        for connection in held:
            connection.close()
        assert gateway.settles()
        raw = body(max_tokens=2)
        assert httpx.post(f"{server.url}{TEXT}", content=raw, headers=JSON).status_code == 200


def test_tokens_arrive_one_by_one_and_not_at_the_end(slow: tuple[Gateway, LiveServer]) -> None:
    """The first token is read while the engine has almost all of its work before it."""
    gateway, server = slow
    with send(server, body(stream=True, max_tokens=500)) as connection:
        seen = b""
        while b"data:" not in seen:
            seen += connection.recv(4096)
        assert gateway.pool.snapshot(MODEL).levels[0].stats.remaining_tokens > 450
