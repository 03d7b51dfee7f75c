"""Every level of the ladder: size, speed, quality, state, use."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    BYTES,
    PER_SECOND,
    PLAIN,
    SECONDS,
    SHARE,
    bars,
    level_table,
    lines,
    page,
    states,
)
from deploy.grafana.queries import (
    PLACE,
    SERVED,
    card,
    quantile,
    rate,
)

STATES = ("absent", "building", "stored", "loading", "ready", "draining", "failed")


def _per_token(metric: str) -> str:
    tokens = rate("shadow_tokens_total", PLACE, "level")
    return f"{rate(metric, PLACE, 'level')} / {tokens}"


def _drafts(metric: str) -> str:
    return rate(metric, PLACE, "level")


def board() -> models.Dashboard:
    columns = {
        "stored": (card("variant_stored_bytes"), BYTES),
        "resident": (card("variant_resident_bytes"), BYTES),
        "compression": (card("compression_ratio"), PLAIN),
        "speed-up": (card("speedup_ratio"), PLAIN),
        "perplexity ratio": (card("variant_perplexity_ratio"), PLAIN),
        "KL, nats": (card("variant_kl_nats"), PLAIN),
        "top-1 agreement": (card("variant_top1_agreement"), SHARE),
        "measured here": (card("variant_measured"), PLAIN),
        "leases": (card("variant_leases"), PLAIN),
    }
    state = " + ".join(
        f'{index} * max by (level) (pressgate_variant_state{{{PLACE}, state="{name}"}})'
        for index, name in enumerate(STATES)
        if index
    )
    return page(
        "pressgate-levels",
        "Pressgate / Levels",
        "Every level of the ladder: size, speed, quality, state, use.",
        {
            "The ladder": (
                level_table("Levels", "Cards, measured on this host or estimated.", columns),
                states("State", "Of each level.", state, STATES),
            ),
            "Size, speed, quality": (
                bars("Stored", "On disk.", {"{{level}}": card("variant_stored_bytes")}, BYTES),
                bars(
                    "Compression", "Dense / stored bytes.", {"{{level}}": card("compression_ratio")}
                ),
                bars(
                    "Speed-up", "Of decoding against dense.", {"{{level}}": card("speedup_ratio")}
                ),
                bars(
                    "Perplexity ratio",
                    "Against dense; 1 is as good.",
                    {"{{level}}": card("variant_perplexity_ratio")},
                ),
                bars("KL from dense", "In nats.", {"{{level}}": card("variant_kl_nats")}),
                bars(
                    "Top-1 agreement",
                    "Share of tokens where dense would choose the same.",
                    {"{{level}}": card("variant_top1_agreement")},
                    SHARE,
                ),
            ),
            "Live quality": (
                lines(
                    "Agreement with dense",
                    "Share of answered tokens that dense would have chosen (`shadow.rate`).",
                    {"{{level}}": _per_token("shadow_agreements_total")},
                    SHARE,
                ),
                lines(
                    "Surprise of dense",
                    "Nats per answered token under dense; sampled text costs its entropy.",
                    {"{{level}}": _per_token("shadow_nll_nats_total")},
                ),
                lines(
                    "Answers scored",
                    "Per second by level.",
                    {"{{level}}": rate("shadow_requests_total", PLACE, "level")},
                    PER_SECOND,
                ),
            ),
            "In use": (
                lines(
                    "Requests",
                    "Per second by level.",
                    {"{{level}}": rate("requests_total", SERVED, "level")},
                    PER_SECOND,
                ),
                lines(
                    "Generated tokens",
                    "Per second by level.",
                    {"{{level}}": rate("generation_tokens_total", SERVED, "level")},
                ),
                lines(
                    "Time per output token, median",
                    "By level, under the present load.",
                    {"{{level}}": quantile(0.5, "time_per_output_token_seconds", by="level")},
                    SECONDS,
                ),
                lines(
                    "Time to first token, median",
                    "By level, under the present load.",
                    {"{{level}}": quantile(0.5, "time_to_first_token_seconds", by="level")},
                    SECONDS,
                ),
                lines(
                    "Drafted tokens kept",
                    "Share of the tokens that speculation proposed.",
                    {
                        "{{level}}": f"{_drafts('accepted_tokens_total')} / "
                        f"{_drafts('drafted_tokens_total')}"
                    },
                    SHARE,
                ),
                lines(
                    "Weights in memory",
                    "Levels share what they have in common.",
                    {"{{level}}": card("variant_resident_bytes")},
                    BYTES,
                ),
                lines(
                    "Pinned",
                    "1 for a level that stays in memory whatever needs room.",
                    {"{{level}}": card("variant_pinned")},
                    most=1,
                ),
                lines(
                    "Leases", "Requests that hold a level.", {"{{level}}": card("variant_leases")}
                ),
            ),
        },
    )
