"""What a run was worth: promises kept, refusals, quality, goodput. Pure.

A request is *kept* when its answer ended normally and every bound of its class's promise holds:
times as this client measured them from the intended moment, quality and memory by the card of the
level that served it. It is *admitted* unless it was refused. Goodput is kept requests per second;
quality-weighted goodput weighs each kept request by dense perplexity ÷ its level's perplexity
(fewer nats per token are worth more, never more than dense). A system that ignores promises is
judged by them all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest.client import Outcome
from loadtest.sla.study import TIMES, Promise, Study

Card = Mapping[str, Any]
_ERRORS: Final = 20


@dataclass(frozen=True, slots=True)
class Judged:
    """One counted request. `level`: None when nothing was served; `broken`: bounds not kept."""

    caller: str
    status: str
    level: str | None
    tokens: int
    ratio: float | None
    broken: tuple[str, ...]
    error: str = ""

    @property
    def kept(self) -> bool:
        return self.status == "ok" and not self.broken

    @property
    def weight(self) -> float:
        """Quality of a kept answer: 1 for dense or better."""
        return min(1.0, 1.0 / self.ratio) if self.kept and self.ratio else 0.0


def judge(outcome: Outcome, promise: Promise, cards: Mapping[str, Card]) -> Judged:
    """`cards`: rows of `GET /v1/levels` by level."""
    level = outcome.level if outcome.status == "ok" else None
    card = cards.get(level or "")
    costs = _costs(outcome, card)
    broken = []
    for name, bound in promise.bounds().items():
        cost = costs.get(name)
        if cost is None:
            # one token has no time between tokens; a first token that never came has no time
            missed = name != "tpot_ms"
        else:
            missed = cost < bound if name == "min_agreement" else cost > bound
        if missed:
            broken.append(name)
    return Judged(
        caller=outcome.planned.traffic.name,
        status=outcome.status,
        level=level,
        tokens=outcome.tokens,
        ratio=None if card is None else float(card["perplexity_ratio"]),
        broken=tuple(broken) if outcome.status == "ok" else (),
        error=f"{outcome.http_status or '-'}: {outcome.error}" if outcome.status != "ok" else "",
    )


def _costs(outcome: Outcome, card: Card | None) -> dict[str, float]:
    seconds = {"ttft_ms": outcome.ttft, "tpot_ms": outcome.tpot, "latency_ms": outcome.latency}
    found = {name: 1000 * value for name in TIMES if (value := seconds[name]) is not None}
    if card is not None:
        tokens = (outcome.prompt_tokens or outcome.planned.prompt_tokens) + outcome.tokens
        kv = float(card["kv_bytes_per_token"]) * tokens
        found["memory_mb"] = (float(card["resident_bytes"]) + kv) / 1e6
        found["max_ppl_ratio"] = float(card["perplexity_ratio"])
        found["min_agreement"] = float(card["top1_agreement"])
    return found


def summarize(study: Study, judged: Sequence[Judged], memory_peak: float) -> dict[str, Any]:
    """Numbers of one run; rates per second of the counted part. `memory_peak`: bytes."""
    seconds = study.traffic.seconds - study.traffic.warm_seconds
    served = [one for one in judged if one.status == "ok" and one.ratio is not None]
    tokens = sum(one.tokens for one in served)
    admitted = [one for one in judged if one.status != "refused"]
    return {
        "requests": len(judged),
        "offered_per_s": len(judged) / seconds,
        "goodput_per_s": sum(one.kept for one in judged) / seconds,
        "quality_goodput_per_s": sum(one.weight for one in judged) / seconds,
        "attainment": _share(judged),
        "attainment_of_admitted": _share(admitted),
        "refused": sum(one.status == "refused" for one in judged),
        "failed": sum(one.status in ("error", "timeout") for one in judged),
        "ppl_ratio": sum((o.ratio or 0.0) * o.tokens for o in served) / tokens if tokens else None,
        "memory_peak_mb": memory_peak / 1e6,
        "errors": dict(Counter(one.error for one in judged if one.error).most_common(_ERRORS)),
        "callers": {
            caller.name: _of_caller([one for one in judged if one.caller == caller.name])
            for caller in study.callers
        },
    }


def _of_caller(judged: Sequence[Judged]) -> dict[str, Any]:
    return {
        "requests": len(judged),
        "attainment": _share(judged),
        "refused": sum(one.status == "refused" for one in judged),
        "broken": dict(Counter(name for one in judged for name in one.broken).most_common()),
        "levels": dict(Counter(one.level for one in judged if one.level).most_common()),
    }


def _share(judged: Sequence[Judged]) -> float | None:
    return sum(one.kept for one in judged) / len(judged) if judged else None
