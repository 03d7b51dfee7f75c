"""Do requests get what they asked for, and does the gateway know beforehand."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    BAD_WHEN_HIGH,
    BAD_WHEN_LOW,
    PER_SECOND,
    PLAIN,
    SECONDS,
    SHARE,
    heat,
    lines,
    number,
    page,
)
from deploy.grafana.queries import (
    ALL,
    OWN,
    PLACE,
    attainment,
    candidate_attainment,
    in_an_hour,
    quantile,
    rate,
    refused,
)


def board() -> models.Dashboard:
    return page(
        "pressgate-slo",
        "Pressgate / SLO",
        "Do requests get what they asked for, and does the gateway know beforehand.",
        {
            "Attainment": (
                number("All", "Met every budget.", attainment(), SHARE, steps=BAD_WHEN_LOW),
                number("Refused", "422, 429, 503.", refused(), SHARE, steps=BAD_WHEN_HIGH),
                number("Met", "Requests per second (goodput).", rate("slo_met_total"), PER_SECOND),
                lines(
                    "By policy",
                    "Share of requests that kept every budget.",
                    {"{{policy}}": attainment("policy")},
                    SHARE,
                    most=1,
                ),
                lines(
                    "By level",
                    "Share of requests that kept every budget.",
                    {"{{level}}": attainment("level")},
                    SHARE,
                    most=1,
                ),
            ),
            "Misses": (
                lines(
                    "By budget",
                    "A request that misses two budgets counts in both; refused: not served at all.",
                    {"{{budget}}": rate("slo_missed_total", ALL, "budget")},
                    PER_SECOND,
                ),
                lines(
                    "By policy and budget",
                    "Misses per second.",
                    {"{{policy}}: {{budget}}": rate("slo_missed_total", ALL, "policy, budget")},
                    PER_SECOND,
                ),
            ),
            "Admission": (
                lines(
                    "Waiting for a slot",
                    "Requests in the gateway's queue, by priority.",
                    {"{{priority}}": "sum by (priority) (pressgate_admission_queue_requests)"},
                    PLAIN,
                ),
                lines(
                    "Wait for a slot, p95",
                    "Of those that waited, by priority and by how it ended.",
                    {
                        "{{priority}} {{outcome}}": quantile(
                            0.95, "admission_wait_seconds", "", "priority, outcome"
                        )
                    },
                    SECONDS,
                ),
                lines(
                    "Refusals",
                    "Before being served, by reason.",
                    {"{{reason}}": rate("refusals_total", "", "reason")},
                    PER_SECOND,
                ),
                lines(
                    "Quotas",
                    "Requests beyond a quota of their API key.",
                    {"{{key}}: {{limit}}": rate("quota_refusals_total", "", "key, limit")},
                    PER_SECOND,
                ),
                lines(
                    "Changes of level",
                    "Running answers that went on at another level.",
                    {"{{level}} to {{to}}": rate("level_changes_total", PLACE, "level, to")},
                    PER_SECOND,
                ),
            ),
            "Policies": (
                lines(
                    "Candidates",
                    "Share of requests that kept every budget, while a candidate is tried.",
                    {"{{policy}}: {{arm}}": candidate_attainment()},
                    SHARE,
                    most=1,
                ),
                lines(
                    "Share that gets the candidate",
                    "0 when none is tried.",
                    {"{{policy}}": f"max by (policy) (pressgate_policy_canary_percent{{{OWN}}})"},
                    PLAIN,
                    most=100,
                ),
                lines(
                    "Changes",
                    "Versions made in the last hour; fallback: a candidate that was dropped.",
                    {"{{policy}}: {{kind}}": in_an_hour("policy_changes_total", "policy, kind")},
                    PLAIN,
                ),
            ),
            "Predicted and measured": (
                lines(
                    "Time to first token, median",
                    "By level.",
                    {
                        "predicted {{level}}": quantile(
                            0.5, "predicted_ttft_seconds", PLACE, "level"
                        ),
                        "measured {{level}}": quantile(
                            0.5, "time_to_first_token_seconds", by="level"
                        ),
                    },
                    SECONDS,
                ),
                lines(
                    "Time per output token, median",
                    "By level.",
                    {
                        "predicted {{level}}": quantile(
                            0.5, "predicted_tpot_seconds", PLACE, "level"
                        ),
                        "measured {{level}}": quantile(
                            0.5, "time_per_output_token_seconds", by="level"
                        ),
                    },
                    SECONDS,
                ),
                lines(
                    "Prediction error, median",
                    "abs(predicted - measured) / measured.",
                    {"{{quantity}}": quantile(0.5, "prediction_error_ratio", PLACE, "quantity")},
                    SHARE,
                ),
                lines(
                    "Prediction error, p90",
                    "abs(predicted - measured) / measured.",
                    {"{{quantity}}": quantile(0.9, "prediction_error_ratio", PLACE, "quantity")},
                    SHARE,
                ),
            ),
            "Distributions": (
                heat(
                    "Time to first token",
                    "Requests per second by bucket.",
                    rate("time_to_first_token_seconds_bucket", by="le"),
                ),
                heat(
                    "Time per output token",
                    "Requests per second by bucket.",
                    rate("time_per_output_token_seconds_bucket", by="le"),
                ),
            ),
        },
    )
