"""The systems of a study: how each server is configured and how each request is addressed.

`fixed LEVEL` serves one level to everybody, as servers that know one precision do. `greedy` has all
levels loadable and takes, per request, the smallest whose *static* profile (its card: idle machine,
one sequence) keeps the promise, as INFaaS (Romero et al., 2021) picks a variant; it knows no queue.
`pressgate` is told the class only and decides itself; an ablation is Pressgate with something taken
away. All run the same engine with the same memory budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loadtest.mix import TrafficClass
from loadtest.sla.judge import Card
from loadtest.sla.study import Promise, Study
from loadtest.workloads import Planned

Cards = Mapping[str, Card]
Address = Callable[[Planned, Cards], Planned]


@dataclass(frozen=True, slots=True)
class System:
    """One way to serve the study's traffic.

    Attributes:
        settings: the server's configuration, without its cache folder.
        address: puts the model's name (and the sla) into a request.
        loaded: levels to load before the run.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    address: Address
    loaded: tuple[str, ...]


def systems(study: Study) -> list[System]:
    """Every system of the study: fixed levels, greedy, Pressgate, ablations."""
    built = tuple(level for level in study.levels if level not in study.absent)
    found = [_fixed(study, level) for level in built]
    found.append(
        System("greedy", "greedy", _settings(study, study.levels), _greedy_for(study), built)
    )
    found.append(_pressgate(study, "pressgate", built))
    for name, taken in study.ablations.items():
        one = _pressgate(
            study, name, built, policy=taken.get("policy", {}), settings=taken.get("settings", {})
        )
        found.append(replace(one, kind="ablation"))
    return found


def _fixed(study: Study, level: str) -> System:
    def address(planned: Planned, _cards: Cards) -> Planned:
        return _pin(study, planned, level)

    return System(f"fixed {level}", "fixed", _settings(study, (level,)), address, (level,))


def _greedy_for(study: Study) -> Address:
    def address(planned: Planned, cards: Cards) -> Planned:
        promise = study.caller(planned.traffic.name).promise
        return _pin(study, planned, smallest(promise, planned, cards))

    return address


def smallest(promise: Promise, planned: Planned, cards: Cards) -> str:
    """The level with the fewest resident bytes whose static profile keeps the promise; when none
    does, the one that breaks the fewest bounds, the quickest of those."""
    usable = {name: card for name, card in cards.items() if card["state"] in ("ready", "stored")}
    broken = {name: _static_misses(promise, planned, card) for name, card in usable.items()}
    fewest = min(broken.values())
    fitting = [name for name, misses in broken.items() if misses == fewest]
    by = "resident_bytes" if fewest == 0 else None
    return min(fitting, key=lambda name: usable[name][by] if by else _static_tpot_ms(usable[name]))


def _static_misses(promise: Promise, planned: Planned, card: Card) -> int:
    ttft = 1000.0 * planned.prompt_tokens / (card["prefill_tokens_per_s"] or 1e-9)
    tpot = _static_tpot_ms(card)
    tokens = planned.prompt_tokens + planned.max_tokens
    costs = {
        "ttft_ms": ttft,
        "tpot_ms": tpot,
        "latency_ms": ttft + (planned.max_tokens - 1) * tpot,
        "max_ppl_ratio": card["perplexity_ratio"],
        "memory_mb": (card["resident_bytes"] + card["kv_bytes_per_token"] * tokens) / 1e6,
    }
    misses = 0
    for name, bound in promise.bounds().items():
        if name == "min_agreement":
            misses += card["top1_agreement"] < bound
        else:
            misses += costs[name] > bound
    return misses


def _static_tpot_ms(card: Card) -> float:
    return 1000.0 / (float(card["decode_tokens_per_s"].get("1", 0.0)) or 1e-9)


def _pressgate(
    study: Study,
    name: str,
    loaded: tuple[str, ...],
    *,
    policy: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> System:
    policies = [
        {"name": caller.name, **caller.promise.bounds(), **caller.policy, **(policy or {})}
        for caller in study.callers
    ]
    config = _settings(study, study.levels) | {"policies": policies} | dict(settings or {})

    def address(planned: Planned, _cards: Cards) -> Planned:
        return planned

    return System(name, "pressgate", config, address, loaded)


def _settings(study: Study, levels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "models": [{"id": study.model, "path": study.path}],
        "levels": [level for level in levels if level != "bf16"],
        "memory_budget": study.memory_budget,
        "log_level": "warning",
        **study.settings,
    }


def _pin(study: Study, planned: Planned, level: str) -> Planned:
    traffic = TrafficClass(
        name=planned.traffic.name,
        weight=planned.traffic.weight,
        goals=planned.traffic.goals,
        model=f"{study.model}@{level}",
    )
    return replace(planned, traffic=traffic)
