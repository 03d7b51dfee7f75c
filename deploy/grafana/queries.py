"""The PromQL that panels share: rates, quantiles, attainment. Knows metrics, not panels."""

from __future__ import annotations

PLACE = 'model=~"$model", level=~"$level"'
SERVED = f'{PLACE}, policy=~"$policy"'
# Refused requests carry the level "none", so what counts them must not filter by level.
ALL = 'model=~"$model", policy=~"$policy"'

OWN = 'policy=~"$policy"'  # what is a policy's own, whatever model it serves


def rate(metric: str, labels: str = SERVED, by: str = "") -> str:
    """Events per second, summed over replicas, by labels."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(pressgate_{metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, metric: str, labels: str = SERVED, by: str = "") -> str:
    """A quantile of a histogram, over replicas, by labels."""
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(metric + '_bucket', labels, grouped)})"


def quantiles(metric: str, labels: str = SERVED) -> dict[str, str]:
    return {f"p{round(q * 100)}": quantile(q, metric, labels) for q in (0.5, 0.95, 0.99)}


def card(metric: str) -> str:
    """A fact of each level; replicas agree but for the hosts they were measured on."""
    return f"max by (level) (pressgate_{metric}{{{PLACE}}})"


def total(metric: str) -> str:
    """A gauge of each level, summed over replicas."""
    return f"sum by (level) (pressgate_{metric}{{{PLACE}}})"


def attainment(by: str = "") -> str:
    """Requests that kept every budget over all that were due an answer (a caller who hung up was
    not); refusals and errors count against it."""
    due = rate("requests_total", f'{ALL}, code!="499"', by)
    met = rate("slo_met_total", ALL, by)
    return f"({met} or 0 * {due}) / ({due} > 0)"


def candidate_attainment() -> str:
    """Of the policies that a candidate is tried for, by arm."""
    by = "policy, arm"
    met = rate("policy_canary_requests_total", f'{OWN}, met="true"', by)
    due = rate("policy_canary_requests_total", OWN, by)
    return f"({met} or 0 * {due}) / ({due} > 0)"


def refused(labels: str = ALL) -> str:
    due = rate("requests_total", f'{labels}, code!="499"')
    sent_away = rate("requests_total", f'{labels}, code=~"422|429|503"')
    return f"({sent_away} or vector(0)) / ({due} > 0)"


def failed() -> str:
    due = rate("requests_total", f'{ALL}, code!="499"')
    broken = rate("requests_total", f'{ALL}, code=~"5..", code!="503"')
    return f"({broken} or vector(0)) / ({due} > 0)"


def in_an_hour(metric: str, by: str) -> str:
    """What a counter gained in the last hour, summed by labels.

    Not `increase()`: that misses the first event of all, with which a labelled counter is born, and
    turns whole numbers into fractions. Without a value an hour ago, or after a restart, everything
    counted is new.
    """
    now = f"pressgate_{metric}"
    return f"sum by ({by}) (({now} - {now} offset 1h >= 0) or {now})"


def rare(metric: str, by: str) -> str:
    """How many in the last hour; a zero where nothing has ever been counted."""
    return f"{in_an_hour(metric, by)} or vector(0)"


def mean_in_an_hour(metric: str, by: str) -> str:
    """Mean of what a histogram saw in the last hour."""
    return f"{in_an_hour(f'{metric}_sum', by)} / ({in_an_hour(f'{metric}_count', by)} > 0)"


def hit_ratio() -> str:
    """Artifacts found over artifacts looked for in the last hour, by tier."""
    hits = in_an_hour("cache_hits_total", "tier")
    misses = in_an_hour("cache_misses_total", "tier")
    found = f"({hits} or 0 * {misses})"
    return f"{found} / (({found} + ({misses} or 0 * {hits})) > 0)"
