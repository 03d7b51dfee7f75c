"""The report: percentiles, throughput, goodput and attainment out of a run's outcomes. Pure.

Definitions, used everywhere: a request is *good* when it ended normally and kept every latency goal
of its class; goodput is good requests per second of the run; attainment is good requests over *all*
that were due, so refusals, errors and timeouts count against the server. Latencies (TTFT, E2E) run
from the intended moment; `ttft_from_sent_ms` is beside them so that the client's own lateness can
be told apart. All times in ms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from loadtest.client import Outcome
from loadtest.mix import GOALS
from loadtest.runner import Run

PERCENTILES = (50, 90, 95, 99)
NO_LEVEL = "none"  # refused or failed before a level was told, or a server that has no levels
_MAX_ERROR_KINDS = 20

_MEASURES: dict[str, Callable[[Outcome], float | None]] = {
    "ttft_ms": lambda outcome: outcome.ttft,
    "tpot_ms": lambda outcome: outcome.tpot,
    "latency_ms": lambda outcome: outcome.latency,
}


def missed_goals(outcome: Outcome) -> tuple[str, ...]:
    """The latency goals an ended request did not keep. A measure that does not exist (no TPOT in an
    answer of one token) misses nothing, except a first token that never came."""
    missed = []
    for name in GOALS:
        goal = getattr(outcome.planned.traffic.goals, name)
        seconds = _MEASURES[name](outcome)
        never_came = seconds is None and name == "ttft_ms"
        if goal is not None and (never_came or (seconds is not None and seconds * 1000 > goal)):
            missed.append(name)
    return tuple(missed)


def is_good(outcome: Outcome) -> bool:
    """Ended normally and within every goal of its class."""
    return outcome.status == "ok" and not missed_goals(outcome)


def spread(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in ms of values in seconds; None when there are none."""
    values = 1000 * np.array([value for value in seconds if value is not None])
    if not values.size:
        return None
    cuts = np.percentile(values, PERCENTILES)
    return {
        "mean": float(values.mean()),
        **{f"p{p}": float(cut) for p, cut in zip(PERCENTILES, cuts, strict=True)},
        "max": float(values.max()),
    }


def summarize(run: Run) -> dict[str, Any]:
    """The whole report of a run, ready for JSON."""
    outcomes = run.outcomes
    by_class = _group(outcomes, lambda outcome: outcome.planned.traffic.name)
    by_level = _group(outcomes, lambda outcome: outcome.level or NO_LEVEL)
    return {
        "elapsed_seconds": run.elapsed,
        "total": _part(outcomes, run.elapsed),
        "send_lag_ms": spread(o.sent - o.intended for o in outcomes),
        "classes": {
            name: _part(group, run.elapsed)
            | {"goals": group[0].planned.traffic.goals.model_dump(exclude_none=True)}
            for name, group in by_class.items()
        },
        "levels": {name: _part(group, run.elapsed) for name, group in by_level.items()},
        "levels_by_class": {
            name: dict(Counter(o.level for o in group if o.level).most_common())
            for name, group in by_class.items()
        },
        "prediction_error": prediction_error(outcomes),
        "errors": dict(
            Counter(
                f"{o.status} {o.http_status or ''}: {o.error}" for o in outcomes if o.status != "ok"
            ).most_common(_MAX_ERROR_KINDS)
        ),
    }


def prediction_error(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """How far the server's predictions were from what this client measured, by budget.

    Only for servers that send `compression.predicted`. The client's times start when the request
    left, as a server's must. `mape` is the mean and `median_ape` the median of
    |predicted − measured| / measured; `bias` is the median of predicted / measured (1 is right).
    """
    measured: dict[str, Callable[[Outcome], float | None]] = {
        "ttft_ms": lambda o: o.ttft_from_sent,
        "tpot_ms": lambda o: o.tpot,
        "latency_ms": lambda o: o.finished - o.sent,
    }
    errors: dict[str, dict[str, float]] = {}
    for name, measure in measured.items():
        ratios = [
            predicted / (1000 * seconds)
            for o in outcomes
            if o.status == "ok"
            and (predicted := _predicted(o, name)) is not None
            and (seconds := measure(o))
        ]
        if ratios:
            off = np.abs(np.array(ratios) - 1)
            errors[name] = {
                "count": len(ratios),
                "mape": float(off.mean()),
                "median_ape": float(np.median(off)),
                "bias": float(np.median(ratios)),
            }
    return errors


def _predicted(outcome: Outcome, name: str) -> float | None:
    predicted = (outcome.compression or {}).get("predicted")
    value = predicted.get(name) if isinstance(predicted, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _part(outcomes: Sequence[Outcome], elapsed: float) -> dict[str, Any]:
    """The numbers of one group of outcomes over the run's time."""
    status = Counter(outcome.status for outcome in outcomes)
    ended = [outcome for outcome in outcomes if outcome.status == "ok"]
    good = sum(map(is_good, outcomes))
    misses = Counter(name for outcome in ended for name in missed_goals(outcome))
    tokens = sum(outcome.tokens for outcome in outcomes)
    span = elapsed or 1.0
    return {
        "requests": len(outcomes),
        "ok": status["ok"],
        "refused": status["refused"],
        "errors": status["error"],
        "timeouts": status["timeout"],
        "good": good,
        "attainment": good / len(outcomes) if outcomes else None,
        "missed": {name: misses[name] for name in GOALS if misses[name]},
        "requests_per_s": len(ended) / span,
        "goodput_per_s": good / span,
        "prompt_tokens": sum(o.prompt_tokens or 0 for o in outcomes),
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / span,
        "ttft_ms": spread(o.ttft for o in ended),
        "ttft_from_sent_ms": spread(o.ttft_from_sent for o in ended),
        "tpot_ms": spread(o.tpot for o in ended),
        "itl_ms": spread(gap for o in ended for gap in np.diff(o.token_times).tolist()),
        "latency_ms": spread(o.latency for o in ended),
    }


def _group(outcomes: Sequence[Outcome], key: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    return dict(sorted(groups.items()))


def record(outcome: Outcome, origin: float) -> dict[str, Any]:
    """One request as plain facts (seconds since `origin`, the start of the run's clock), for
    whoever wants to compute something else from a run."""
    return {
        "index": outcome.planned.index,
        "class": outcome.planned.traffic.name,
        "status": outcome.status,
        "http_status": outcome.http_status,
        "error": outcome.error,
        "level": outcome.level,
        "intended_s": outcome.intended - origin,
        "sent_s": outcome.sent - origin,
        "token_times_s": [moment - origin for moment in outcome.token_times],
        "finished_s": outcome.finished - origin,
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "finish_reason": outcome.finish_reason,
        "compression": outcome.compression,
        "good": is_good(outcome),
    }
