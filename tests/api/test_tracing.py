"""Traces: spans sent by the official exporter to a real receiver that decodes the protobuf."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from gateway.api.tracing import carried
from gateway.config import Tracing
from gateway.engine.base import GenerationRequest, SamplingParams
from gateway.engine.upstream import UpstreamEngine
from tests.api.test_decisions import BODY, TEXT, client, serving, settings

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

GIVEN = f"00-{TRACE}-{PARENT}-01"


class Receiver:
    """A collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    data = gzip.decompress(data)
                receiver.take(ExportTraceServiceRequest.FromString(data))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.services |= {
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def named(self, start: str) -> Span:
        (span,) = [span for span in self.spans if span.name.startswith(start)]
        return span


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def facts(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_one_trace_under_its_callers(tmp_path: Path, receiver: Receiver) -> None:
    options = settings(tmp_path, tracing=Tracing(otlp_endpoint=receiver.url, service_name="gate"))
    with serving(options) as live, client(live) as http:
        answer = http.post(
            TEXT,
            json=BODY | {"seed": 7, "sla": {"ttft_ms": 5000}},
            headers={"traceparent": GIVEN},
        ).json()
    names = {span.name for span in receiver.spans}
    assert names == {
        "text_completion fake", "queue", "decide", "load", "generate bf16", "prefill", "decode",
    }  # fmt: skip
    assert receiver.services == {"gate"}
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    request, generate = receiver.named("text_completion"), receiver.named("generate")
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SpanKind.SPAN_KIND_SERVER
    for name, parent in (
        ("queue", request), ("decide", request), ("load", request), ("generate", request),
        ("prefill", generate), ("decode", generate),
    ):  # fmt: skip
        span = receiver.named(name)
        assert span.parent_span_id == parent.span_id
        assert parent.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano
    told = facts(request)
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == "fake"
    assert told["gen_ai.request.seed"] == 7
    assert told["gen_ai.response.model"] == "fake@bf16"
    assert told["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["http.response.status_code"] == 200
    assert told["pressgate.decision_id"] == answer["compression"]["decision_id"]
    assert (told["pressgate.level"], told["pressgate.policy"]) == ("bf16", "default")
    assert told["pressgate.slo_met"] is True
    assert told["pressgate.measured.ttft_ms"] > 0
    assert not any("secret" in str(facts(span)) for span in receiver.spans)


def test_refusals_and_streams_are_traced_and_texts_on_demand(
    tmp_path: Path, receiver: Receiver
) -> None:
    options = settings(tmp_path, tracing=Tracing(otlp_endpoint=receiver.url, text=True))
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with serving(options) as live, client(live) as http:
        http.post(TEXT, json=BODY | {"sla": {"tpot_ms": 0.001, "on_miss": "reject"}})
        http.post("/v1/chat/completions", json=chat | {"max_tokens": 3})
    refused, served = receiver.named("text_completion"), receiver.named("chat")
    assert facts(refused)["error.type"] == "422"
    assert facts(refused)["pressgate.action"] == "reject"
    assert not refused.parent_span_id
    assert refused.trace_id != served.trace_id
    (asked,) = json.loads(facts(served)["gen_ai.input.messages"])
    assert "hi" in asked["parts"][0]["content"]
    (told,) = json.loads(facts(served)["gen_ai.output.messages"])
    assert told["role"] == "assistant"
    assert facts(served)["gen_ai.usage.output_tokens"] == 3


def test_the_trace_goes_on_in_an_upstream_engine(tmp_path: Path, receiver: Receiver) -> None:
    """What the engine sends to another gateway is that gateway's request, in the same trace."""
    tracing = Tracing(otlp_endpoint=receiver.url)
    with serving(settings(tmp_path, tracing=tracing)) as inner:
        engine = UpstreamEngine(inner.url, "fake")
        context = {"traceparent": GIVEN}
        request = GenerationRequest("r", (1, 2), SamplingParams(max_tokens=2), context=context)

        async def generate() -> None:
            async for _ in engine.generate(request):
                pass
            await engine.close()

        inner.run(generate())
    span = receiver.named("text_completion")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)


def test_a_caller_that_does_not_sample_is_heeded(tmp_path: Path, receiver: Receiver) -> None:
    options = settings(tmp_path, tracing=Tracing(otlp_endpoint=receiver.url))
    with serving(options) as live, client(live) as http:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert http.post(TEXT, json=BODY, headers=headers).status_code == 200
    assert receiver.spans == []


def test_a_collector_that_is_away_harms_nobody(tmp_path: Path) -> None:
    options = settings(tmp_path, tracing=Tracing(otlp_endpoint="http://127.0.0.1:9/v1/traces"))
    with serving(options) as live, client(live) as http:
        assert http.post(TEXT, json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ({}, {}),
        ({"traceparent": "nonsense"}, {}),
        ({"traceparent": GIVEN, "tracestate": "é"}, {"traceparent"}),
        (
            {"traceparent": GIVEN, "tracestate": "a=b"},
            {"traceparent", "tracestate"},
        ),
        ({"tracestate": "a=b"}, {}),
    ],
)
def test_only_a_well_formed_context_is_passed_on(headers: dict[str, str], kept: set[str]) -> None:
    assert set(carried(headers)) == set(kept)
