"""What `/metrics` says, parsed back with Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import FakeModel, Model
from gateway.metrics import Finished, Metrics
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.jobs import Job, JobState
from gateway.variants.pool import VariantPool

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(metrics: Metrics) -> Samples:
    return {
        (sample.name.removeprefix("pressgate_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


PLACE = {"model": "m", "level": "int8"}
SERVED = PLACE | {"policy": "p"}


def test_a_finished_request_is_counted_once_in_every_series(metrics: Metrics) -> None:
    done = Finished(
        "m", "int8", "p", 200, prompt_tokens=10, cached_tokens=4, generated_tokens=7,
        queue_s=0.01, ttft_s=0.2, tpot_s=0.03, e2e_s=0.4,
    )  # fmt: skip
    metrics.request_finished(done)
    assert value(metrics, "requests_total", code="200", **SERVED) == 1
    assert value(metrics, "prompt_tokens_total", **SERVED) == 10
    assert value(metrics, "prompt_cached_tokens_total", **SERVED) == 4
    assert value(metrics, "generation_tokens_total", **SERVED) == 7
    for name, seconds in (
        ("time_to_first_token_seconds", 0.2),
        ("time_per_output_token_seconds", 0.03),
        ("e2e_latency_seconds", 0.4),
        ("queue_seconds", 0.01),
    ):
        assert value(metrics, f"{name}_count", **SERVED) == 1
        assert value(metrics, f"{name}_sum", **SERVED) == pytest.approx(seconds)


def test_a_refused_request_counts_its_code_and_no_times(metrics: Metrics) -> None:
    metrics.request_finished(Finished("m", "none", "p", 429))
    found = samples(metrics)
    assert ("requests_total", tuple(sorted({"model": "m", "level": "none", "policy": "p",
                                             "code": "429"}.items()))) in found  # fmt: skip
    assert not [name for name, _ in found if name.endswith("_count")]


def test_slo_counts_each_missed_budget_or_one_success(metrics: Metrics) -> None:
    metrics.slo("m", "int8", "p", ())
    metrics.slo("m", "int8", "p", ("ttft_ms", "latency_ms"))
    assert value(metrics, "slo_met_total", **SERVED) == 1
    assert value(metrics, "slo_missed_total", budget="ttft_ms", **SERVED) == 1
    assert value(metrics, "slo_missed_total", budget="latency_ms", **SERVED) == 1


@pytest.mark.parametrize("predicted", [0.5, 1.5], ids=["too-low", "too-high"])
def test_prediction_error_is_relative_to_what_was_measured(
    metrics: Metrics, predicted: float
) -> None:
    metrics.prediction_error("m", "int8", "ttft", predicted_s=predicted, measured_s=1.0)
    total = value(metrics, "prediction_error_ratio_sum", quantity="ttft", **PLACE)
    assert total == pytest.approx(0.5)


def test_build_progress_follows_the_job_and_its_end(metrics: Metrics) -> None:
    job = Job("j", "m", "int8", JobState.RUNNING, 0.25, "layer 1", created=0.0)
    metrics.job_changed(job)
    assert value(metrics, "build_progress_ratio", **PLACE) == 0.25
    ended = Job(
        "j", "m", "int8", JobState.DONE, 1.0, "done", created=0.0, finished=3.0, build_seconds=3.0
    )
    metrics.job_changed(ended)
    assert value(metrics, "build_progress_ratio", **PLACE) == 1.0
    assert value(metrics, "build_seconds_sum", outcome="done", **PLACE) == 3.0


def test_cache_and_redis_events(metrics: Metrics) -> None:
    metrics.cache_hit("disk")
    metrics.cache_miss("redis")
    metrics.cache_evicted("disk", 2)
    metrics.cache_corrupted("disk")
    metrics.redis_up(False)
    metrics.cache_bytes("disk", 12.0)
    assert value(metrics, "cache_hits_total", tier="disk") == 1
    assert value(metrics, "cache_misses_total", tier="redis") == 1
    assert value(metrics, "cache_evictions_total", tier="disk") == 2
    assert value(metrics, "cache_corruptions_total", tier="disk") == 1
    assert value(metrics, "cache_bytes", tier="disk") == 12
    assert value(metrics, "redis_up") == 0


async def test_level_gauges_are_read_from_the_pool_at_each_scrape(metrics: Metrics) -> None:
    backend = FakeBackend(Model(id="m", fake=FakeModel(tpot_ms=0.1)), ("int8",))
    pool = VariantPool([backend], memory_budget=10**9, max_jobs=4)
    metrics.watch(pool)
    metrics.render()  # a scrape before the pool has started must not fail
    await pool.open()
    await pool.load_defaults()
    assert value(metrics, "variant_state", state="absent", **PLACE) == 1
    assert value(metrics, "variant_state", state="ready", **PLACE) == 0
    assert value(metrics, "variant_resident_bytes", **PLACE) == 0
    await pool.warm("m", "int8")
    assert value(metrics, "variant_state", state="ready", **PLACE) == 1
    assert value(metrics, "variant_state", state="absent", **PLACE) == 0
    facts = pool.snapshot("m").level("int8")
    assert facts is not None
    for name, expected in (
        ("variant_stored_bytes", facts.card.stored_bytes),
        ("variant_resident_bytes", facts.card.resident_bytes),
        ("variant_perplexity_ratio", facts.card.perplexity_ratio),
        ("compression_ratio", facts.card.compression_ratio),
        ("speedup_ratio", facts.card.speedup),
    ):
        assert value(metrics, name, **PLACE) == pytest.approx(expected)
    assert value(metrics, "memory_used_bytes") == pool.memory_used()
    assert value(metrics, "memory_budget_bytes") == 10**9
    async with pool.lease("m", "int8", wait_s=1):
        assert value(metrics, "variant_leases", **PLACE) == 1
    assert value(metrics, "variant_leases", **PLACE) == 0
    await pool.close()


def test_names_follow_prometheus_practice(metrics: Metrics) -> None:
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert families
    for family in families:
        assert family.name.startswith("pressgate_")
        assert family.documentation
        assert not family.name.endswith(("_ms", "_mb"))
