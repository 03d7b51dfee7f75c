"""Is it well, how fast is it, what does it use."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    BAD_WHEN_HIGH,
    BAD_WHEN_LOW,
    BYTES,
    NEARLY_FULL,
    PER_SECOND,
    SECONDS,
    SHARE,
    lines,
    number,
    page,
)
from deploy.grafana.queries import (
    ALL,
    attainment,
    card,
    failed,
    quantile,
    quantiles,
    rate,
    refused,
    total,
)


def board() -> models.Dashboard:
    return page(
        "pressgate-overview",
        "Pressgate / Overview",
        "Is it well, how fast is it, what does it use.",
        {
            "Now": (
                number("Requests", "Per second.", rate("requests_total", ALL), PER_SECOND),
                number(
                    "Kept their budgets",
                    "Share of the requests due an answer that met every budget.",
                    attainment(),
                    SHARE,
                    steps=BAD_WHEN_LOW,
                ),
                number(
                    "Server errors", "Share of 5xx but 503.", failed(), SHARE, steps=BAD_WHEN_HIGH
                ),
                number("Refused", "Share of 422, 429, 503.", refused(), SHARE, steps=BAD_WHEN_HIGH),
                number("TTFT p95", "", quantile(0.95, "time_to_first_token_seconds"), SECONDS),
                number("TPOT p95", "", quantile(0.95, "time_per_output_token_seconds"), SECONDS),
            ),
            "Traffic": (
                lines(
                    "Requests by status",
                    "Answers per second by HTTP status.",
                    {"{{code}}": rate("requests_total", ALL, "code")},
                    PER_SECOND,
                ),
                lines(
                    "Requests by level",
                    "Where the gateway sends them; none: refused before a level was chosen.",
                    {"{{level}}": rate("requests_total", ALL, "level")},
                    PER_SECOND,
                ),
                lines(
                    "Tokens",
                    "Per second.",
                    {
                        "prompt": rate("prompt_tokens_total"),
                        "prompt, from the prefix cache": rate("prompt_cached_tokens_total"),
                        "generated": rate("generation_tokens_total"),
                    },
                ),
                lines(
                    "Decisions",
                    "What was decided and why.",
                    {"{{action}}: {{reason}}": rate("decisions_total", ALL, "action, reason")},
                    PER_SECOND,
                ),
            ),
            "Latency": (
                lines(
                    "Time to first token",
                    "From the request's arrival.",
                    quantiles("time_to_first_token_seconds"),
                    SECONDS,
                ),
                lines(
                    "Time per output token",
                    "Mean gap of a request.",
                    quantiles("time_per_output_token_seconds"),
                    SECONDS,
                ),
                lines("End to end", "Whole answers.", quantiles("e2e_latency_seconds"), SECONDS),
                lines(
                    "Before the engine",
                    "Decision, admission and loading.",
                    quantiles("queue_seconds"),
                    SECONDS,
                ),
                lines(
                    "Decision",
                    "Looking at the ladder and deciding; a part of what comes before the engine.",
                    quantiles("decision_seconds", 'model=~"$model"'),
                    SECONDS,
                ),
            ),
            "Load": (
                lines(
                    "Sequences",
                    "In the engines, by level.",
                    {
                        "running {{level}}": total("requests_running"),
                        "waiting {{level}}": total("requests_waiting"),
                    },
                ),
                lines(
                    "KV cache",
                    "Share of the blocks in use, fullest replica.",
                    {"{{level}}": card("kv_cache_usage_ratio")},
                    SHARE,
                    most=1,
                ),
                lines(
                    "Memory",
                    "Weights and KV caches against the budget, by replica.",
                    {
                        "used {{instance}}": "max by (instance) (pressgate_memory_used_bytes)",
                        "budget {{instance}}": "max by (instance) (pressgate_memory_budget_bytes)",
                    },
                    BYTES,
                ),
                lines(
                    "Levels that left memory",
                    "For others that needed the room, since each replica started.",
                    {"{{instance}}": "max by (instance) (pressgate_memory_evictions_total)"},
                ),
                number(
                    "Memory in use",
                    "Share of the budget, fullest replica.",
                    "max(pressgate_memory_used_bytes / pressgate_memory_budget_bytes)",
                    SHARE,
                    steps=NEARLY_FULL,
                ),
                number("Replicas", "Gateways that answer Prometheus.", 'sum(up{job="pressgate"})'),
                number("Open builds", "Queued or running.", "sum(pressgate_builds_open)"),
            ),
        },
    )
