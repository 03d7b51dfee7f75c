"""One request as OpenTelemetry spans: request, queue, decide, load, generate, prefill, decode.

Built on the official API and SDK, which are imported only when tracing is on. Spans are sent by the
SDK's own thread; nothing here waits. Attributes follow the semantic conventions for generative AI;
ours begin with `pressgate.`. No prompt and no answer unless the configuration asks for them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

import orjson

from gateway.config import Tracing
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from gateway.api.wanted import Wanted
    from gateway.policy.record import Record

CONTEXT: Final = ("traceparent", "tracestate")
_CLOSE_SECONDS: Final = 3.0  # for the last spans when the gateway ends
_EXPORT_SECONDS: Final = 5.0
_PARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_STATE: Final = re.compile(r"[\x20-\x7e]{1,512}")
_PERF_TO_UNIX: Final = 1_000_000_000

Attributes = dict[str, str | bool | int | float | Sequence[str]]
Decode = Callable[[str, Sequence[int]], str]


def carried(headers: Mapping[str, str]) -> dict[str, str]:
    """The W3C trace context of a request, as far as it is well-formed."""
    parent, state = (headers.get(name, "") for name in CONTEXT)
    if not _PARENT.fullmatch(parent):
        return {}
    return {"traceparent": parent} | ({"tracestate": state} if _STATE.fullmatch(state) else {})


class Traces:
    """Makes traces and sends them; see `open_traces`."""

    def __init__(self, options: Tracing, exporter: SpanExporter, decode: Decode) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(options.sample_ratio),
            resource=Resource.create({"service.name": options.service_name}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pressgate")
        self._decode = decode if options.text else None

    @property
    def with_text(self) -> bool:
        return self._decode is not None

    def begin(self, wanted: Wanted, headers: Mapping[str, str], arrived: float) -> Trace:
        """A request that came in at `arrived` (`time.perf_counter()`)."""
        return Trace(self._tracer, wanted, carried(headers), arrived, self._decode)

    def close(self) -> None:
        """Send the last spans, as far as that takes no longer than a moment. Blocks."""
        last = Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(_CLOSE_SECONDS)


def open_traces(options: Tracing, decode: Decode) -> Traces | None:
    """None when tracing is off. `decode`: the text of token ids of a model.

    Raises:
        ConfigError: the OpenTelemetry packages are not installed.
    """
    if options.otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(options.otlp_endpoint, timeout=_EXPORT_SECONDS)
        return Traces(options, exporter, decode)
    except ImportError:
        raise ConfigError(
            "tracing.otlp_endpoint: needs OpenTelemetry: pip install 'pressgate[otel]'",
            param="tracing.otlp_endpoint",
        ) from None


class Trace:
    """The spans of one request. Times are `time.perf_counter()` seconds.

    Attributes:
        context: the headers that carry the trace on to another server.
    """

    def __init__(
        self,
        tracer: Tracer,
        wanted: Wanted,
        context: Mapping[str, str],
        arrived: float,
        decode: Decode | None,
    ) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._wanted = wanted
        self._decode = decode
        self._arrived = arrived
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        self._propagator = TraceContextTextMapPropagator()
        self._operation = "chat" if wanted.chat else "text_completion"
        self._request = tracer.start_span(
            f"{self._operation} {wanted.model}",
            self._propagator.extract(context),
            kind=SpanKind.SERVER,
            attributes=self._asked(),
            start_time=self._ns(arrived),
        )
        self._generate: Span | None = None
        self._leased_at = arrived
        self._decided_at: float | None = None
        self._waited_s = 0.0
        self.context: Mapping[str, str] = self._written(self._request)

    def decided(self, waited_s: float) -> None:
        """The decision is taken, `waited_s` after the request came in."""
        self._decided_at, self._waited_s = time.perf_counter(), waited_s

    def leased(self, level: str) -> None:
        """The level is held: generation begins."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._leased_at = time.perf_counter()
        self._generate = self._tracer.start_span(
            f"generate {level}",
            set_span_in_context(self._request),
            kind=SpanKind.CLIENT,
            attributes={"pressgate.level": level},
            start_time=self._ns(self._leased_at),
        )
        self.context = self._written(self._generate)

    def ended(self, record: Record | None, code: int, times: tuple[float, float] | None) -> None:
        """The request is over. `times`: of the first token and of the last one."""
        if self._request.is_recording():
            self._children(record, times)
            self._told(record, code)
        self._request.end()

    def _children(self, record: Record | None, times: tuple[float, float] | None) -> None:
        if self._decided_at is not None:
            began = self._arrived + self._waited_s
            if self._waited_s:
                self._span("queue", self._request, self._arrived, began)
            facts: Attributes = {}
            if record is not None:
                decision = record.decision
                facts = {"pressgate.action": decision.action, "pressgate.reason": decision.code}
            self._span("decide", self._request, began, self._decided_at, facts)
            if self._generate is not None:
                self._span("load", self._request, self._decided_at, self._leased_at)
        if self._generate is not None:
            if times is not None:
                self._span("prefill", self._generate, self._leased_at, times[0])
                self._span("decode", self._generate, times[0], times[1])
            self._generate.end()

    def _span(
        self, name: str, parent: Span, start: float, end: float, facts: Attributes | None = None
    ) -> None:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(
            name, set_span_in_context(parent), attributes=facts, start_time=self._ns(start)
        )
        span.end(self._ns(max(start, end)))

    def _asked(self) -> Attributes:
        wanted, sampling = self._wanted, self._wanted.sampling
        facts: Attributes = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "pressgate",
            "gen_ai.request.model": wanted.name,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.usage.input_tokens": wanted.prompt_tokens,
            "http.request.method": "POST",
            "url.path": "/v1/chat/completions" if wanted.chat else "/v1/completions",
        }
        if sampling.seed is not None:
            facts["gen_ai.request.seed"] = sampling.seed
        if wanted.n > 1:
            facts["gen_ai.request.choice.count"] = wanted.n
        return facts

    def _told(self, record: Record | None, code: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        facts: Attributes = {"http.response.status_code": code}
        if code >= 400:
            facts["error.type"] = str(code)
        if record is not None:
            facts |= _decided(record)
            facts |= self._texts(record)
        self._request.set_attributes(facts)
        if code >= 500:
            self._request.set_status(Status(StatusCode.ERROR))

    def _texts(self, record: Record) -> Attributes:
        if self._decode is None or record.text is None:
            return {}
        role, model = ("user" if self._wanted.chat else "prompt"), self._wanted.model
        told = {}
        for name, who, texts in (
            ("gen_ai.input.messages", role, record.text[0]),
            ("gen_ai.output.messages", "assistant", record.text[1]),
        ):
            parts = [[{"type": "text", "content": self._decode(model, ids)}] for ids in texts]
            told[name] = orjson.dumps([{"role": who, "parts": part} for part in parts]).decode()
        return dict(told)

    def _written(self, span: Span) -> Mapping[str, str]:
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier

    def _ns(self, at: float) -> int:
        return int(at * _PERF_TO_UNIX) + self._offset_ns


def _decided(record: Record) -> Attributes:
    """What a decision and its end say about themselves."""
    decision, result = record.decision, record.result
    facts: dict[str, Any] = {
        "pressgate.decision_id": record.id,
        "pressgate.policy": decision.policy,
        "pressgate.action": decision.action,
        "pressgate.reason": decision.code,
        "pressgate.key": record.key,
        "pressgate.level": decision.level or decision.build,
    }
    if decision.predicted is not None:
        facts["pressgate.predicted.ttft_ms"] = decision.predicted.ttft_ms
        facts["pressgate.predicted.tpot_ms"] = decision.predicted.tpot_ms
        facts["pressgate.predicted.memory_mb"] = decision.predicted.memory_mb
    if result is not None:
        level = decision.level or decision.build
        model = None if decision.case is None else decision.case.ask.model
        facts |= {
            "gen_ai.response.model": f"{model}@{level}" if result.code == 200 else None,
            "gen_ai.usage.output_tokens": result.generated_tokens,
            "pressgate.measured.ttft_ms": result.costs.get("ttft_ms"),
            "pressgate.measured.tpot_ms": result.costs.get("tpot_ms"),
            "pressgate.slo_met": None if result.missed is None else not result.missed,
            "pressgate.missed": list(result.missed) if result.missed else None,
        }
    return {name: fact for name, fact in facts.items() if fact is not None}
