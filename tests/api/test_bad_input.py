"""Every kind of bad input: a 4xx in OpenAI's shape that names the field, and the server goes on."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.api.schemas import ChatBody, CompletionBody
from tests.support.fake_pool import MODEL, Gateway
from tests.support.live import LiveServer

CHAT, TEXT, EXPLAIN = "/v1/chat/completions", "/v1/completions", "/v1/explain"
HELLO = [{"role": "user", "content": "hello"}]
CONTEXT = 4096


def check(response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    """The error object, after checking the shape that every error has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["param"] == param
    assert "Traceback" not in response.text
    assert "pydantic" not in response.text
    return error


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x"} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO} | fields


def case(path: str, body: dict[str, Any], param: str, id_: str, status: int = 400) -> Any:
    return pytest.param(path, body, param, status, id=id_)


SHARED = [
    ("model-missing", {"model": None}, "model"),
    ("model-number", {"model": 5}, "model"),
    ("model-empty", {"model": ""}, "model"),
    ("model-at-nothing", {"model": f"{MODEL}@"}, "model"),
    ("n-zero", {"n": 0}, "n"),
    ("n-too-many", {"n": 9}, "n"),
    ("n-fraction", {"n": 1.5}, "n"),
    ("n-bool", {"n": True}, "n"),
    ("temperature-negative", {"temperature": -0.1}, "temperature"),
    ("temperature-absurd", {"temperature": 1e300}, "temperature"),
    ("temperature-text", {"temperature": "0.5"}, "temperature"),
    ("top-p-zero", {"top_p": 0}, "top_p"),
    ("top-p-over", {"top_p": 1.01}, "top_p"),
    ("top-k-negative", {"top_k": -2}, "top_k"),
    ("min-p-over", {"min_p": 2}, "min_p"),
    ("max-tokens-negative", {"max_tokens": -1}, "max_tokens"),
    ("max-tokens-text", {"max_tokens": "many"}, "max_tokens"),
    ("max-tokens-absurd", {"max_tokens": 10**30}, "max_tokens"),
    ("max-tokens-over-context", {"max_tokens": CONTEXT + 1}, "max_tokens"),
    ("seed-text", {"seed": "x"}, "seed"),
    ("seed-absurd", {"seed": 2**70}, "seed"),
    ("stop-too-many", {"stop": ["a"] * 17}, "stop"),
    ("stop-empty-string", {"stop": [""]}, "stop"),
    ("stop-number", {"stop": 5}, "stop"),
    ("stop-long", {"stop": "x" * 300}, "stop"),
    ("presence-penalty-over", {"presence_penalty": 2.5}, "presence_penalty"),
    ("repetition-penalty-zero", {"repetition_penalty": 0}, "repetition_penalty"),
    ("logit-bias-over", {"logit_bias": {"5": 101}}, "logit_bias.5"),
    ("logit-bias-key", {"logit_bias": {"five": 1}}, "logit_bias"),
    ("logit-bias-outside-vocabulary", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("format-unknown", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("format-without-schema", {"response_format": {"type": "json_schema"}}, "response_format"),
    ("stream-text", {"stream": "yes"}, "stream"),
    ("stream-options-without-stream", {"stream_options": {}}, "stream_options"),
    (
        "stream-options-unknown",
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
    ),
    ("unknown-field", {"temprature": 1}, "temprature"),
    ("tools", {"tools": [{"type": "function"}]}, "tools"),
    ("sla-number", {"sla": 5}, "sla"),
    ("sla-unknown", {"sla": {"ttft": 5}}, "sla.ttft"),
    ("sla-negative", {"sla": {"ttft_ms": -5}}, "sla.ttft_ms"),
    ("sla-zero", {"sla": {"tpot_ms": 0}}, "sla.tpot_ms"),
    ("sla-absurd", {"sla": {"latency_ms": 1e12}}, "sla.latency_ms"),
    ("sla-text", {"sla": {"memory_mb": "12"}}, "sla.memory_mb"),
    ("sla-ppl-below-one", {"sla": {"max_ppl_ratio": 0.5}}, "sla.max_ppl_ratio"),
    ("sla-agreement-over", {"sla": {"min_agreement": 1.5}}, "sla.min_agreement"),
    ("sla-objective", {"sla": {"objective": "speed"}}, "sla.objective"),
    ("sla-on-miss", {"sla": {"on_miss": "panic"}}, "sla.on_miss"),
]
CASES = [
    *[case(TEXT, text(**fields), param, f"text-{id_}") for id_, fields, param in SHARED],
    *[case(CHAT, chat(**fields), param, f"chat-{id_}") for id_, fields, param in SHARED],
    case(TEXT, {"model": MODEL}, "prompt", "prompt-missing"),
    case(TEXT, text(prompt=None), "prompt", "prompt-null"),
    case(TEXT, text(prompt=5), "prompt", "prompt-number"),
    case(TEXT, text(prompt=[]), "prompt", "prompt-no-entries"),
    case(TEXT, text(prompt=""), "prompt", "prompt-empty"),
    case(TEXT, text(prompt=[[]]), "prompt", "prompt-no-ids"),
    case(TEXT, text(prompt=["x", 5]), "prompt", "prompt-mixed"),
    case(TEXT, text(prompt=[1, True]), "prompt", "prompt-bool-id"),
    case(TEXT, text(prompt=[-1]), "prompt", "prompt-negative-id"),
    case(TEXT, text(prompt=[10**6]), "prompt", "prompt-id-outside-vocabulary"),
    case(TEXT, text(prompt=[1.5]), "prompt", "prompt-fraction-id"),
    case(TEXT, text(prompt=["x"] * 129), "prompt", "prompt-too-many"),
    case(TEXT, text(prompt=["x"] * 120, n=8), "prompt", "prompt-too-many-sequences"),
    case(TEXT, text(prompt="x" * CONTEXT), "prompt", "prompt-too-long"),
    case(TEXT, text(prompt="x" * (CONTEXT - 5), max_tokens=6), "max_tokens", "no-room"),
    case(TEXT, text(logprobs=21), "logprobs", "logprobs-too-many"),
    case(TEXT, text(logprobs=-1), "logprobs", "logprobs-negative"),
    case(TEXT, text(logprobs=True), "logprobs", "logprobs-bool"),
    case(TEXT, text(max_tokens=0), "max_tokens", "nothing-to-do"),
    case(TEXT, text(suffix="x"), "suffix", "suffix"),
    case(TEXT, text(best_of=3), "best_of", "best-of"),
    case(TEXT, text(messages=HELLO), "messages", "messages-for-text"),
    case(CHAT, chat(messages=[]), "messages", "messages-empty"),
    case(CHAT, chat(messages="hi"), "messages", "messages-text"),
    case(CHAT, chat(messages=[{"role": "robot", "content": "x"}]), "messages.0.role", "role"),
    case(CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages.0.content", "turn"),
    case(
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages.0.content",
        "image",
    ),
    case(CHAT, chat(messages=[{"role": "user", "content": "x" * CONTEXT}]), "messages", "long"),
    case(
        CHAT,
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{}]}]),
        "messages.0.tool_calls",
        "tool-calls",
    ),
    case(CHAT, chat(max_tokens=0), "max_tokens", "chat-max-tokens-zero"),
    case(CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "top-logprobs-too-many"),
    case(CHAT, chat(top_logprobs=2), "top_logprobs", "top-logprobs-alone"),
    case(CHAT, chat(functions=[{}]), "functions", "functions"),
    case(TEXT, text(model="nope"), "model", "unknown-model", 404),
    case(TEXT, text(model=f"{MODEL}@int3"), "model", "unknown-level", 404),
    case(TEXT, text(sla={"policy": "nope"}), "sla.policy", "unknown-policy", 404),
    case(EXPLAIN, text(temperature=9), "temperature", "explain-text"),
    case(EXPLAIN, chat(temperature=9), "temperature", "explain-chat"),
    case(EXPLAIN, {"model": MODEL}, "prompt", "explain-neither"),
]


@pytest.mark.parametrize(("path", "body", "param", "status"), CASES)
def test_bad_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, status: int
) -> None:
    error = check(http.post(path, json=body), status, param)
    assert error["type"] == "invalid_request_error"


def test_too_long_prompts_carry_openai_s_code(http: httpx.Client) -> None:
    for body in (text(prompt="x" * CONTEXT), text(max_tokens=CONTEXT)):
        error = http.post(TEXT, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"   ", id="blank"),
        pytest.param(b"{", id="cut-off"),
        pytest.param(b"{'model': 1}", id="single-quotes"),
        pytest.param(b"\xff\xfe", id="not-utf8"),
        pytest.param(b'{"model": "\\ud800"}', id="lone-surrogate"),
        pytest.param(b"[" * 60_000, id="deep"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b'{"model":"fake","prompt":"x"} trailing', id="trailing"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, EXPLAIN, "/v1/policies/p"])
def test_bad_json(http: httpx.Client, path: str, raw: bytes) -> None:
    method = "PUT" if "policies" in path else "POST"
    headers = {"content-type": "application/json"}
    response = http.request(method, path, content=raw, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (None, "body", "model")
    assert error["param"] != "model" or raw.startswith(b'{"model"')


@pytest.mark.parametrize("raw", [b"{", b'"a: b"'])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_body_at_fault_as_a_whole_is_called_body(
    http: httpx.Client, path: str, raw: bytes
) -> None:
    headers = {"content-type": "application/json"}
    check(http.post(path, content=raw, headers=headers), 400, "body")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_none(http: httpx.Client, field: str, number: str) -> None:
    raw = f'{{"model": "{MODEL}", "prompt": "x", "{field}": {number}}}'
    response = http.post(TEXT, content=raw, headers={"content-type": "application/json"})
    check(response, 400, field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_budgets_that_are_no_numbers(http: httpx.Client, number: str) -> None:
    raw = f'{{"model": "{MODEL}", "prompt": "x", "sla": {{"ttft_ms": {number}}}}}'
    response = http.post(TEXT, content=raw, headers={"content-type": "application/json"})
    check(response, 400, "sla.ttft_ms")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-tpot-ms", "-1"),
        ("x-slo-latency-ms", "nan"),
        ("x-slo-latency-ms", "0"),
        ("x-slo-ttft-ms", "1e99"),
        ("x-pressgate-policy", "p" * 65),
    ],
)
def test_bad_headers_are_named(http: httpx.Client, name: str, value: str) -> None:
    check(http.post(TEXT, json=text(), headers={name: value}), 400, name)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize("path", [CHAT, TEXT, EXPLAIN])
def test_wrong_content_type(http: httpx.Client, path: str, kind: str) -> None:
    raw = json.dumps(text()).encode()
    check(http.post(path, content=raw, headers={"content-type": kind}), 400, "content-type")


def test_a_declared_body_over_the_limit_is_refused_unread(server: LiveServer) -> None:
    """The answer comes although not one byte of the body was sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        raw.sendall(f"{head}content-length: 999999999\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", [CHAT, TEXT, EXPLAIN])
def test_a_chunked_body_over_the_limit_is_cut_off(http: httpx.Client, path: str) -> None:
    def pieces() -> Any:
        for _ in range(100):
            yield b" " * 4096

    response = http.post(path, content=pieces(), headers={"content-type": "application/json"})
    check(response, 413, "body")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/levels/int8:melt", 404),
        ("GET", "/v1/jobs/nope", 404),
        ("GET", "/v1/policies/nope", 404),
        ("DELETE", "/v1/policies/nope", 404),
        ("GET", "/v1/models/nope", 404),
        ("POST", "/v1/levels/nope:build", 404),
        ("POST", "/v1/levels/int8:build?model=nope", 404),
        ("GET", "/v1/levels?model=nope", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ],
)
def test_what_is_not_there(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status, response.text
    assert {"message", "type", "param", "code"} <= set(response.json()["error"])


def test_harmless_fields_are_accepted(http: httpx.Client) -> None:
    body = text(
        user="u", metadata={"a": "b"}, store=True, service_tier="auto", suffix=None, tools=[],
        max_tokens=1, top_k=-1, temperature=None, stop=None, seed=None, response_format=None,
    )  # fmt: skip
    assert http.post(TEXT, json=body).status_code == 200


def test_utf8_survives_both_ways(http: httpx.Client) -> None:
    body = text(prompt="naïve 語 🗜", max_tokens=40, echo=True, seed=3)
    answer = http.post(TEXT, json=body).json()["choices"][0]["text"]
    assert answer.startswith("naïve 語 🗜")
    assert "\ufffd" not in answer


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    [*CompletionBody.model_fields, *ChatBody.model_fields, "metadata", "tools", "zzz"]
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=st.dictionaries(_FIELDS, _JSON, max_size=3), path=st.sampled_from([TEXT, CHAT]))
def test_no_body_causes_a_server_error(
    http: httpx.Client, fields: dict[str, Any], path: str
) -> None:
    base = text(max_tokens=1) if path == TEXT else chat(max_tokens=1)
    raw = json.dumps(base | fields)  # writes NaN and Infinity as such
    response = http.post(path, content=raw, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 413), response.text


def test_the_server_goes_on(http: httpx.Client, gateway: Gateway) -> None:
    assert http.post(TEXT, json=text()).status_code == 200
    assert gateway.settles()
