"""Every Prometheus metric of the gateway, once. Owns names, labels and buckets; decides nothing.

What happens is counted through the methods of `Metrics`; what *is* (levels, memory, queues) is read
from a `Ladders` provider when Prometheus scrapes, so it cannot go stale. Label values are bounded:
models, levels and policies come from configuration, never straight from a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.gauges import LadderCollector, Ladders
from gateway.variants.jobs import Job, JobState

NONE = "none"
"""Label value where there is no model, level or policy (e.g. a refused request)."""

_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 120)
_TPOT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 1, 2.5)
_E2E = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WORK = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
_ERROR = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5, 10)
_DECISION = (1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 7.5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 5e-2)
_PLACE = ("model", "level")
_SERVED = ("model", "level", "policy")

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)
Tier = Literal["memory", "disk", "redis"]


@dataclass(frozen=True, slots=True)
class Finished:
    """One request at its end, however it ended. Seconds; None where it did not get that far."""

    model: str
    level: str
    policy: str
    code: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class Metrics:
    """The metrics in one registry (its own by default, so that two can live in a test)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._children: dict[tuple[object, ...], Any] = {}
        self._requests = self._counter("requests", "Requests by status", (*_SERVED, "code"))
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", _SERVED, _TTFT
        )
        self._tpot = self._histogram(
            "time_per_output_token_seconds",
            "Mean gap between tokens of one request",
            _SERVED,
            _TPOT,
        )
        self._e2e = self._histogram("e2e_latency_seconds", "Arrival to last token", _SERVED, _E2E)
        self._queue = self._histogram(
            "queue_seconds", "Arrival to engine: decision, admission, loading", _SERVED, _QUEUE
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens served", _SERVED)
        self._cached = self._counter(
            "prompt_cached_tokens", "Prompt tokens not recomputed", _SERVED
        )
        self._generated = self._counter("generation_tokens", "Tokens generated", _SERVED)
        self._decisions = self._counter(
            "decisions", "Decisions by action and reason", (*_SERVED, "action", "reason")
        )
        self._moves = self._counter(
            "level_changes",
            "Running answers that went on at another level",
            ("model", "level", "to"),
        )
        self._decision_time = self._histogram(
            "decision_seconds", "Looking at the ladder and deciding", ("model",), _DECISION
        )
        self._slo_met = self._counter("slo_met", "Requests that kept every budget", _SERVED)
        self._slo_missed = self._counter(
            "slo_missed", "Requests that missed this budget", (*_SERVED, "budget")
        )
        self._predicted_ttft = self._histogram(
            "predicted_ttft_seconds", "Predicted time to first token", _PLACE, _TTFT
        )
        self._predicted_tpot = self._histogram(
            "predicted_tpot_seconds", "Predicted time per output token", _PLACE, _TPOT
        )
        self._error = self._histogram(
            "prediction_error_ratio",
            "abs(predicted - measured) / measured",
            (*_PLACE, "quantity"),
            _ERROR,
        )
        self._unrecorded = self._counter(
            "decision_records_lost", "Decisions that could not be kept or logged", ("where",)
        )
        self._admission()
        self._live_quality()
        self._policy_changes()
        self._build_work()
        self._cache()

    def _admission(self) -> None:
        self._waiting = self._gauge(
            "admission_queue_requests", "Requests waiting for a slot", ("priority",)
        )
        self._turns = self._histogram(
            "admission_wait_seconds",
            "Arrival to the end of waiting for a slot, by how it ended",
            ("priority", "outcome"),
            _QUEUE,
        )
        self._refusals = self._counter(
            "refusals", "Requests refused before being served", ("reason",)
        )
        self._quota_refusals = self._counter(
            "quota_refusals", "Requests beyond a quota of their API key", ("key", "limit")
        )

    def _live_quality(self) -> None:
        self._shadow_requests = self._counter("shadow_requests", "Answers dense scored", _PLACE)
        self._shadow_tokens = self._counter("shadow_tokens", "Tokens of those answers", _PLACE)
        self._shadow_agreements = self._counter(
            "shadow_agreements", "Those tokens that dense would have chosen", _PLACE
        )
        self._shadow_nll = self._counter(
            "shadow_nll_nats", "Their summed negative log-likelihood under dense", _PLACE
        )

    def _policy_changes(self) -> None:
        self._policy_events = self._counter(
            "policy_changes", "Policy versions made here, by kind", ("policy", "kind")
        )
        self._canary_outcomes = self._counter(
            "policy_canary_requests",
            "Requests of policies that a candidate is tried for",
            ("policy", "arm", "met"),
        )
        self._canary_percent = self._gauge(
            "policy_canary_percent", "Share of requests that get the candidate", ("policy",)
        )

    def _build_work(self) -> None:
        self._builds = self._histogram(
            "build_seconds", "Builds by outcome", (*_PLACE, "outcome"), _WORK
        )
        self._progress = self._gauge("build_progress_ratio", "Share of the build done", _PLACE)
        self._loads = self._histogram("load_seconds", "Loads into memory", _PLACE, _WORK)

    def _cache(self) -> None:
        self._hits = self._counter("cache_hits", "Artifacts found", ("tier",))
        self._misses = self._counter("cache_misses", "Artifacts not found", ("tier",))
        self._bytes = self._gauge("cache_bytes", "Bytes kept", ("tier",))
        self._evictions = self._counter("cache_evictions", "Artifacts evicted for room", ("tier",))
        self._corruptions = self._counter(
            "cache_corruptions", "Files that failed their digest", ("tier",)
        )
        self._redis_up = self._gauge("redis_up", "1 when Redis answers, 0 when it does not")

    # -- requests ---------------------------------------------------------------------------

    def request_finished(self, done: Finished) -> None:
        labels = (done.model, done.level, done.policy)
        self._at(self._requests, *labels, str(done.code)).inc()
        timings = (
            (self._queue, done.queue_s),
            (self._ttft, done.ttft_s),
            (self._tpot, done.tpot_s),
            (self._e2e, done.e2e_s),
        )
        for histogram, seconds in timings:
            if seconds is not None:
                self._at(histogram, *labels).observe(seconds)
        if done.generated_tokens:
            self._at(self._prompt, *labels).inc(done.prompt_tokens)
            self._at(self._cached, *labels).inc(done.cached_tokens)
            self._at(self._generated, *labels).inc(done.generated_tokens)

    def slo(self, model: str, level: str, policy: str, missed: Iterable[str]) -> None:
        """`missed`: names of the budget fields not kept; none means the SLO was met."""
        missed = tuple(missed)
        if not missed:
            self._at(self._slo_met, model, level, policy).inc()
        for budget in missed:
            self._at(self._slo_missed, model, level, policy, budget).inc()

    def decision(
        self, model: str, level: str | None, policy: str, action: str, reason: str
    ) -> None:
        """`reason` must be a short code from a closed set, not a sentence."""
        self._at(self._decisions, model, level or NONE, policy, action, reason).inc()

    def moved(self, model: str, level: str, to: str) -> None:
        """A running answer went on at another level."""
        self._at(self._moves, model, level, to).inc()

    def decision_took(self, model: str, seconds: float) -> None:
        """What one decision cost, the look at the ladder included."""
        self._at(self._decision_time, model).observe(seconds)

    def unrecorded(self, where: str, count: int) -> None:
        """Decisions not kept: in `memory` (too many at once), on `disk`, in `redis` or in the
        `log`."""
        self._at(self._unrecorded, where).inc(count)

    def queue_length(self, priority: int, waiting: int) -> None:
        """How many of a priority wait for a slot now."""
        self._at(self._waiting, str(priority)).set(waiting)

    def queue_left(self, priority: int, outcome: str, seconds: float) -> None:
        """One no longer waits: `served`, `refused`, or `gone` with its caller."""
        self._at(self._turns, str(priority), outcome).observe(seconds)

    def refused(self, reason: str) -> None:
        """`reason`: a decision's code, or which bound of the house was reached."""
        self._at(self._refusals, reason).inc()

    def quota_refused(self, key: str, limit: str) -> None:
        """A quota of an API key is used up; `limit`: its field in the configuration."""
        self._at(self._refusals, "quota").inc()
        self._at(self._quota_refusals, key, limit).inc()

    def predicted(
        self,
        model: str,
        level: str,
        quantity: Literal["ttft", "tpot", "latency"],
        predicted_s: float,
    ) -> None:
        """A prediction made for a request that will be served."""
        target = {"ttft": self._predicted_ttft, "tpot": self._predicted_tpot}.get(quantity)
        if target is not None:
            self._at(target, model, level).observe(predicted_s)

    def prediction_error(
        self,
        model: str,
        level: str,
        quantity: Literal["ttft", "tpot", "latency"],
        *,
        predicted_s: float,
        measured_s: float,
    ) -> None:
        if measured_s > 0:
            error = abs(predicted_s - measured_s) / measured_s
            self._at(self._error, model, level, quantity).observe(error)

    def shadowed(self, model: str, level: str, tokens: int, agreeing: int, nll: float) -> None:
        """One answer scored by the dense level."""
        self._at(self._shadow_requests, model, level).inc()
        self._at(self._shadow_tokens, model, level).inc(tokens)
        self._at(self._shadow_agreements, model, level).inc(agreeing)
        self._at(self._shadow_nll, model, level).inc(nll)

    def policy_changed(self, policy: str, kind: str) -> None:
        """One version of a policy; `kind` is from a closed set."""
        self._at(self._policy_events, policy, kind).inc()

    def canary_outcome(self, policy: str, arm: str, met: bool) -> None:
        """One request of a policy that a candidate is tried for."""
        self._at(self._canary_outcomes, policy, arm, str(met).lower()).inc()

    def canary_percent(self, policy: str, percent: float) -> None:
        self._at(self._canary_percent, policy).set(percent)

    # -- builds and cache -------------------------------------------------------------------

    def job_changed(self, job: Job) -> None:
        """Follow a build job; give this to the job board."""
        if not job.ended:
            self._at(self._progress, job.model, job.level).set(job.progress)
            return
        self._at(self._progress, job.model, job.level).set(
            1.0 if job.state is JobState.DONE else 0.0
        )
        self._at(self._builds, job.model, job.level, job.state.value).observe(job.build_seconds)

    def loaded(self, model: str, level: str, seconds: float) -> None:
        self._at(self._loads, model, level).observe(seconds)

    def cache_hit(self, tier: Tier) -> None:
        self._at(self._hits, tier).inc()

    def cache_miss(self, tier: Tier) -> None:
        self._at(self._misses, tier).inc()

    def cache_evicted(self, tier: Tier, count: int = 1) -> None:
        self._at(self._evictions, tier).inc(count)

    def cache_corrupted(self, tier: Tier) -> None:
        self._at(self._corruptions, tier).inc()

    def cache_bytes(self, tier: Tier, size: float) -> None:
        self._at(self._bytes, tier).set(size)

    def redis_up(self, up: bool) -> None:
        self._redis_up.set(1.0 if up else 0.0)

    # -- exposition -------------------------------------------------------------------------

    def watch(self, ladders: Ladders) -> None:
        """Export the state of every level, read at each scrape."""
        self.registry.register(LadderCollector(ladders))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _at(self, metric: _Metric, *labels: str) -> _Metric:
        """The child of these labels; its own look-up takes a lock and three times as long."""
        child = self._children.get((metric, *labels))
        if child is None:
            child = self._children[metric, *labels] = metric.labels(*labels)
        return cast(_Metric, child)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"pressgate_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"pressgate_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        return Histogram(f"pressgate_{name}", text, labels, registry=self.registry, buckets=buckets)
