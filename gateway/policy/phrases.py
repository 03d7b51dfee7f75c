"""The words of counterfactuals: short, true, with the very numbers that were tried. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from gateway.policy.decision import Decision

_MORE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ttft_ms": "{} ms more to the first token",
        "tpot_ms": "{} ms more per token",
        "latency_ms": "{} ms more in all",
        "memory_mb": "{} MB more memory",
    }
)
_AT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ttft_ms": "{} ms to the first token",
        "tpot_ms": "{} ms per token",
        "latency_ms": "{} ms in all",
        "memory_mb": "{} MB",
        "max_ppl_ratio": "a perplexity ratio of at most {}",
        "min_agreement": "an agreement of at least {}",
    }
)


def relaxation(
    level: str, bounds: Mapping[str, float], needed: Mapping[str, float], policy: str | None
) -> str:
    """The least change of `bounds` that gets `level`; `policy`: whose word it needs, if any."""
    parts = [
        _MORE[name].format(_more(bounds[name], bound))
        if name in _MORE
        else _AT[name].format(_exact(bound))
        for name, bound in needed.items()
    ]
    given = "With" if policy is None else f"Had policy {policy} allowed"
    return f"{given} {_listed(parts)}, you would have got {level}."


def cheapest(level: str, bounds: Mapping[str, float]) -> str:
    parts = [_AT[name].format(_exact(bound)) for name, bound in bounds.items()]
    return f"The cheapest budget that gets {level} is {_listed(parts)}."


def tighter(name: str, at: float, then: Decision, ratios: Mapping[str, float]) -> str:
    """What one bound just too tight for the choice would have brought."""
    given = f"With {_AT[name].format(_exact(at))}"
    level = then.level or then.build
    if then.action == "reject" or level is None:
        return f"{given}, the request would have been refused."
    what = f"{level} (perplexity ratio {ratios[level]:.4g})"
    if then.action == "wait":
        return f"{given}, you would have waited for {what}."
    if then.misses:
        return f"{given}, no usable level keeps the budget; {what} is the nearest."
    return f"{given}, you would have got {what}."


def unpinned(then: Decision) -> str:
    """What naming no level would have brought."""
    given = "Had no level been named"
    level = then.level or then.build
    if then.action == "reject" or level is None:
        return f"{given}, the request would have been refused."
    verb = "waited for" if then.action == "wait" else "got"
    return f"{given}, you would have {verb} {level}."


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _more(bound: float, needed: float) -> str:
    """How much more, in as few digits as still reach it."""
    short = f"{needed - bound:.6g}"
    return short if "e" not in short and bound + float(short) >= needed else _exact(needed - bound)


def _exact(value: float) -> str:
    """Shortest text of exactly this number, without an exponent where it is short."""
    text = f"{value:.9g}"
    return text if "e" not in text and float(text) == value else repr(value)
