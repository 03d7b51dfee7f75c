"""Artifacts on disk and in Redis, builds on the fly, loads."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    BYTES,
    SECONDS,
    SHARE,
    lines,
    number,
    page,
)
from deploy.grafana.queries import (
    card,
    hit_ratio,
    mean_in_an_hour,
    rare,
)


def board() -> models.Dashboard:
    return page(
        "pressgate-cache",
        "Pressgate / Cache and builds",
        "Artifacts on disk and in Redis, builds on the fly, loads.",
        {
            "Builds": (
                number("Open", "Queued or running.", "sum(pressgate_builds_open)"),
                number(
                    "Failed in an hour",
                    "Builds.",
                    rare('build_seconds_count{outcome="failed"}', "outcome"),
                    steps=((None, "green"), (1, "red")),
                ),
                number(
                    "Redis",
                    "1 when every replica reaches it; 0 also when none is configured.",
                    "min(pressgate_redis_up)",
                    steps=((None, "orange"), (1, "green")),
                ),
                lines(
                    "Progress",
                    "Share of each build done.",
                    {"{{level}}": card("build_progress_ratio")},
                    SHARE,
                    most=1,
                ),
                lines(
                    "Builds in the last hour",
                    "By outcome.",
                    {"{{outcome}}": rare("build_seconds_count", "outcome")},
                ),
                lines(
                    "Build time",
                    "Mean of the builds in the last hour.",
                    {"{{level}}": mean_in_an_hour("build_seconds", "level")},
                    SECONDS,
                ),
                lines(
                    "Load time",
                    "Mean of the loads in the last hour.",
                    {"{{level}}": mean_in_an_hour("load_seconds", "level")},
                    SECONDS,
                ),
            ),
            "Cache": (
                lines(
                    "Hit ratio",
                    "Artifacts found over looked for, by tier, in the last hour.",
                    {"{{tier}}": hit_ratio()},
                    SHARE,
                    most=1,
                ),
                lines(
                    "Kept",
                    "Bytes by tier.",
                    {"{{tier}}": "max by (tier) (pressgate_cache_bytes)"},
                    BYTES,
                ),
                lines(
                    "Evictions in the last hour",
                    "Artifacts evicted for room, by tier.",
                    {"{{tier}}": rare("cache_evictions_total", "tier")},
                ),
                lines(
                    "Corrupt files in the last hour",
                    "Failed their digest; set aside, never served.",
                    {"{{tier}}": rare("cache_corruptions_total", "tier")},
                ),
                lines(
                    "Decisions not kept in the last hour",
                    "In memory: too many at once; otherwise where they could not be written.",
                    {"{{where}}": rare("decision_records_lost_total", "where")},
                ),
            ),
        },
    )
