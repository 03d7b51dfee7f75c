"""The state of every level as Prometheus sees it, read from the pool at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.variants.jobs import Job
from gateway.variants.variant import LadderSnapshot, LevelFacts, State

_PLACE: Final = ("model", "level")


class Ladders(Protocol):
    """What the scrape-time gauges read; the variant pool is one."""

    @property
    def memory_budget(self) -> int: ...
    @property
    def memory_evictions(self) -> int: ...
    def memory_used(self) -> int: ...
    def models(self) -> list[str]: ...
    def snapshot(self, model: str) -> LadderSnapshot: ...
    def jobs(self) -> Sequence[Job]: ...


_LEVEL_GAUGES: Mapping[str, tuple[str, Callable[[LevelFacts], float | None]]] = {
    "requests_running": ("Sequences being decoded", lambda f: f.stats.running),
    "requests_waiting": ("Sequences waiting in the engine", lambda f: f.stats.waiting),
    "kv_cache_usage_ratio": (
        "KV blocks in use",
        lambda f: (
            f.stats.kv_used_blocks / f.stats.kv_total_blocks if f.stats.kv_total_blocks else None
        ),
    ),
    "variant_leases": ("Requests holding the level", lambda f: f.leases),
    "variant_stored_bytes": ("Bytes of the artifact", lambda f: f.card.stored_bytes or None),
    "variant_resident_bytes": (
        "Bytes of weights in memory now",
        lambda f: f.card.resident_bytes if f.state in (State.READY, State.DRAINING) else 0,
    ),
    "compression_ratio": ("Dense bytes / stored bytes", lambda f: f.card.compression_ratio),
    "speedup_ratio": ("Decode speed / dense decode speed", lambda f: f.card.speedup),
    "variant_perplexity_ratio": ("Perplexity / dense", lambda f: f.card.perplexity_ratio),
    "variant_kl_nats": ("KL divergence from dense", lambda f: f.card.kl_nats),
    "variant_top1_agreement": ("Top-1 agreement with dense", lambda f: f.card.top1_agreement),
    "variant_pinned": ("1 if it stays in memory whatever needs room", lambda f: f.pinned),
    "variant_measured": ("1 if the card was measured on this host", lambda f: f.card.measured),
}


_LEVEL_COUNTERS: Mapping[str, tuple[str, Callable[[LevelFacts], float]]] = {
    "drafted_tokens": ("Tokens that speculation proposed", lambda f: f.stats.drafted_tokens),
    "accepted_tokens": ("Proposed tokens that were kept", lambda f: f.stats.accepted_tokens),
}


class LadderCollector(Collector):
    """Gauges, and counters that begin anew with each load, from ladder snapshots while scraping."""

    def __init__(self, ladders: Ladders) -> None:
        self._ladders = ladders

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: registration must not sample a pool that has not started."""
        return ()

    def collect(self) -> Iterator[Metric]:
        pool = self._ladders
        facts = [(m, level) for m in pool.models() for level in pool.snapshot(m).levels]
        for name, (text, read) in _LEVEL_GAUGES.items():
            family = GaugeMetricFamily(f"pressgate_{name}", text, labels=_PLACE)
            for model, level in facts:
                if (value := read(level)) is not None:
                    family.add_metric((model, level.level), float(value))
            yield family
        for name, (text, count) in _LEVEL_COUNTERS.items():
            counter = CounterMetricFamily(f"pressgate_{name}", text, labels=_PLACE)
            for model, level in facts:
                counter.add_metric((model, level.level), float(count(level)))
            yield counter
        yield self._states(facts)
        yield CounterMetricFamily(
            "pressgate_memory_evictions",
            "Levels that left memory for another",
            value=pool.memory_evictions,
        )
        for name, text, value in (
            ("memory_budget_bytes", "What weights and KV may use", pool.memory_budget),
            ("memory_used_bytes", "What weights and KV use", pool.memory_used()),
            ("builds_open", "Builds queued or running", sum(not j.ended for j in pool.jobs())),
        ):
            yield GaugeMetricFamily(f"pressgate_{name}", text, value=value)

    @staticmethod
    def _states(facts: Iterable[tuple[str, LevelFacts]]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "pressgate_variant_state", "1 for the state the level is in", labels=(*_PLACE, "state")
        )
        for model, level in facts:
            for state in State:
                value = 1.0 if state is level.state else 0.0
                family.add_metric((model, level.level, state.value), value)
        return family
