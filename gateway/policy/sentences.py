"""The words of a decision: short, true, with numbers. Pure; decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.policy.budget import Bounds, Costs, Objective
from gateway.policy.columns import needs_build
from gateway.policy.judge import BARRIERS
from gateway.policy.objective import PRAISE, Option
from gateway.variants.variant import State

_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ttft_ms": "time to first token",
        "tpot_ms": "time per token",
        "latency_ms": "latency",
        "memory_mb": "memory",
        "max_ppl_ratio": "perplexity ratio",
        "min_agreement": "agreement",
    }
)
_UNITS: Final[Mapping[str, str]] = MappingProxyType(
    {"ttft_ms": " ms", "tpot_ms": " ms", "latency_ms": " ms", "memory_mb": " MB"}
)


def served(code: str, option: Option, objective: Objective, fitting: int, bounds: Bounds) -> str:
    """Why `option` serves; `fitting`: how many levels would fit, itself among them."""
    guess = "estimated " if not option.facts.card.measured else ""
    numbers = _numbers(option, objective)
    if code == "pinned":
        tail = f", although its {_broken(option, bounds)}" if option.broken else ""
        return f"{option.level} was asked for by name ({guess}{numbers}){tail}."
    if code == "fits":
        of = f"the {fitting} levels that keep the budget" if bounds else f"all {fitting} levels"
        if fitting == 1:
            return f"{option.level} is the only usable level that fits ({guess}{numbers})."
        return f"{option.level} has {PRAISE[objective]} of {of} ({guess}{numbers})."
    if code == "cold":
        return (
            f"{option.level} keeps the budget once loaded; this time its {_broken(option, bounds)}."
        )
    return (
        f"No usable level keeps the budget; {option.level} is nearest: {_broken(option, bounds)}."
    )


def steady(option: Option, better: Option, objective: Objective) -> str:
    """Why `option` goes on serving a kind of request although `better` would fit."""
    return (
        f"{option.level} goes on serving requests like this one ({_numbers(option, objective)}); "
        f"{better.level} would be better, but not by enough to change now."
    )


def preparing(reason: str, target: Option, seconds: float) -> str:
    """`reason`, with what is made ready meanwhile."""
    how = "built" if needs_build(target.facts) else "loaded"
    return f"{reason[:-1]}; {target.level} would be better once {how} (about {_seconds(seconds)})."


def waits(option: Option, seconds: float) -> str:
    return f"{option.level} is worth waiting for: its build takes about {_seconds(seconds)}."


def to_build(option: Option, seconds: float) -> str:
    how = "built" if needs_build(option.facts) else "loaded"
    return f"{option.level} has to be {how} first (about {_seconds(seconds)})."


def busy(running: int, retry: float, *, harmful: bool = False) -> str:
    """`running`: sequences on all levels; `harmful`: one more would break a running promise."""
    if harmful:
        return (
            f"One more sequence beside the {running} that run would break a promise made to one "
            f"of them; try again in about {_seconds(retry)}."
        )
    return (
        f"No level keeps the budget under the present load ({running} sequences); "
        f"one could in about {_seconds(retry)}."
    )


def crowded(why: str | None, retry: float) -> str:
    """Why somebody who could be served later is told so now; `why`: which bound is reached."""
    because = why or "Those who wait already leave no slot in time to keep the budget"
    return f"{because[0].upper()}{because[1:]}; try again in about {_seconds(retry)}."


def failure(option: Option, retry: float) -> str:
    """Why nothing serves when the failure of `option` is to blame."""
    return (
        f"No usable level keeps the budget, and {option.level} {_failed(option)}; "
        f"it may be tried again in about {_seconds(retry)}."
    )


def unpaid(target: Option, seconds: float, expected: float) -> str:
    how = "building" if needs_build(target.facts) else "loading"
    return (
        f"Only {target.level} would keep the budget, and {how} it (about {_seconds(seconds)}) "
        f"does not pay for {expected:.0f} expected requests."
    )


def unmet(near: Option | None, levels: int, bounds: Bounds) -> str:
    """`near`: the usable level that misses by the least, if any level is usable at all."""
    if near is None:
        return f"None of the {levels} levels can be used."
    return f"No level can keep the budget; {near.level} is nearest: {_broken(near, bounds)}."


def refused(option: Option, policy: str) -> str:
    """Why a pinned level is not served."""
    if option.barrier == "failed":
        return f"{option.level} {_failed(option)}."
    if option.barrier == "levels":
        return f"{option.level} is not among the levels of policy {policy}."
    return f"{option.level} is {BARRIERS[option.barrier]}."


def verdict(option: Option, bounds: Bounds, build_seconds: float) -> str:
    """One level's verdict."""
    if option.barrier:
        return _failed(option) if option.barrier == "failed" else BARRIERS[option.barrier]
    if option.broken:
        return _broken(option, bounds)
    if needs_build(option.facts):
        building = option.facts.state is State.BUILDING
        how = "is being built (up to" if building else "has to be built first (about"
        return f"would fit; {how} {_seconds(build_seconds)})"
    if option.predicted.load_ms:
        return f"fits, its load of {_plain(option.predicted.load_ms)} ms included"
    return "fits"


def relaxed(
    bounds: Bounds, broken: Mapping[str, float], have: Costs | None
) -> dict[str, float] | None:
    """`bounds` with the broken ones moved to what `have` keeps, rounded outwards; None when no
    number keeps one of them (a level whose quality is not finite)."""
    met: dict[str, float] = {}
    for name, bound in bounds:
        if name not in broken or have is None:
            met[name] = bound
            continue
        value = getattr(have, name)
        if not math.isfinite(value):
            return None
        if name == "min_agreement":
            met[name] = math.floor(value * 1e4) / 1e4
        else:
            digits = 1e4 if name == "max_ppl_ratio" else 10.0
            met[name] = math.ceil(value * digits) / digits
    return met


def _failed(option: Option) -> str:
    return f"failed: {(option.facts.error or 'no reason was given').rstrip('.')}"


def _broken(option: Option, bounds: Bounds) -> str:
    have = option.judged
    parts = []
    for name, bound in bounds:
        if name in option.broken:
            relation = "below" if name == "min_agreement" else "above"
            value, limit = _apart(getattr(have, name), bound)
            parts.append(f"{_NAMES[name]} {value} is {relation} {limit}{_UNITS.get(name, '')}")
    return ", ".join(parts)


def _numbers(option: Option, objective: Objective) -> str:
    predicted = option.predicted
    times = (
        f"first token {_plain(predicted.ttft_ms)} ms, then {_plain(predicted.tpot_ms)} ms a token"
    )
    if objective == "memory":
        return f"{_plain(predicted.memory_mb)} MB, {times}"
    return f"perplexity ratio {option.facts.card.perplexity_ratio:.3f}, {times}"


def _apart(value: float, bound: float) -> tuple[str, str]:
    """Both numbers with as few digits as still tell them apart."""
    for digits in range(3, 12):
        pair = f"{value:.{digits}g}", f"{bound:.{digits}g}"
        if pair[0] != pair[1]:
            return _unexponent(pair[0]), _unexponent(pair[1])
    return repr(value), repr(bound)


def _plain(value: float) -> str:
    """Three significant digits, never in exponent notation."""
    return _unexponent(f"{value:.3g}")


def _unexponent(text: str) -> str:
    return f"{float(text):.0f}" if "e+" in text else text


def _seconds(seconds: float) -> str:
    return f"{_plain(seconds)} s" if seconds >= 0.1 else f"{_plain(1000 * seconds)} ms"
