"""What a policy would have done with recorded traffic: the real `decide` on a simulated ladder.

Pure: no clock, no files. A trace does not hold `max_tokens`, so each request asks for as many
tokens as it got.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import NotFound
from gateway.policy.budget import Costs, excess
from gateway.policy.decide import Ask, Decision, decide
from gateway.policy.policy import DEFAULT, Policy
from gateway.policy.predictor import Predictor
from gateway.policy.simulate import Job, Ladder
from gateway.policy.trace import Arrival
from gateway.variants.variant import LadderSnapshot


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One policy's share of a replay.

    Attributes:
        attainment: requests that kept all their bounds ÷ all requests; a refusal keeps none.
        missed: how many answers broke each bound.
        waited: requests that waited for a build.
        levels: share of the served requests per level.
        refusals: how many, per kind.
        mean_ppl_ratio: perplexity ratio of the served tokens; None when nothing was served.
        ttft_ms, tpot_ms, latency_ms: percentiles `p50` and `p95` of what was served.
    """

    policy: str
    requests: int
    served: int
    waited: int
    attainment: float
    missed: Mapping[str, int]
    levels: Mapping[str, float]
    refusals: Mapping[str, int]
    mean_ppl_ratio: float | None
    ttft_ms: Mapping[str, float]
    tpot_ms: Mapping[str, float]
    latency_ms: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((name, getattr(self, name)) for name in self.__slots__)
        }


def replay(
    arrivals: Iterable[Arrival], policies: Sequence[Policy], ladder: LadderSnapshot
) -> tuple[PolicyReport, ...]:
    """Run `arrivals`, in order of time, against `ladder` as it is at the beginning.

    A request goes to the policy its `sla` names, else to `default`, else to the first policy given.
    One report per policy that had requests, in the order given.

    Raises:
        NotFound: a request names a policy that is not among `policies`.
    """
    run = _Run(policies, ladder)
    for arrival in arrivals:
        run.arrive(arrival)
    run.ladder.drain()
    return tuple(tally.report() for tally in run.tallies.values() if tally.requests)


@dataclass(slots=True)
class _Tally:
    """What is counted for one policy."""

    policy: Policy
    requests: int = 0
    waited: int = 0
    met: int = 0
    tokens: int = 0
    weighted_ratio: float = 0.0
    levels: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)

    def report(self) -> PolicyReport:
        served = sum(self.levels.values())
        return PolicyReport(
            policy=self.policy.name,
            requests=self.requests,
            served=served,
            waited=self.waited,
            attainment=self.met / self.requests,
            missed=dict(self.missed),
            levels={level: count / served for level, count in self.levels.most_common()},
            refusals=dict(self.refusals),
            mean_ppl_ratio=self.weighted_ratio / self.tokens if self.tokens else None,
            ttft_ms=_percentiles(self.ttft_ms),
            tpot_ms=_percentiles(self.tpot_ms),
            latency_ms=_percentiles(self.latency_ms),
        )


class _Run:
    """One replay: the ladder, the predictor that learns from it, the tallies."""

    def __init__(self, policies: Sequence[Policy], start: LadderSnapshot) -> None:
        self.tallies = {policy.name: _Tally(policy) for policy in policies}
        self.ladder = Ladder(start, self._finished)
        self._cards = {facts.level: facts.card for facts in start.levels}
        self._model = start.model
        self._predictor = Predictor()
        self._decided: dict[int, tuple[_Tally, Decision]] = {}

    def arrive(self, arrival: Arrival) -> None:
        self.ladder.advance(arrival.time_s)
        tally = self._tally(arrival)
        ask = Ask(self._model, arrival.prompt_tokens, arrival.output_tokens, None, arrival.sla)
        decision = decide(ask, tally.policy, self.ladder.snapshot(), self._predictor.predict)
        tally.requests += 1
        if decision.action == "wait":
            tally.waited += 1
        elif decision.build is not None:
            self.ladder.build(decision.build)
        if decision.warm is not None:
            self.ladder.warm(decision.warm)
        level = decision.build if decision.action == "wait" else decision.level
        if decision.action == "reject" or level is None:
            tally.refusals[decision.code] += 1
            return
        job = Job(arrival.time_s, arrival.prompt_tokens, arrival.output_tokens)
        self._decided[id(job)] = (tally, decision)
        self.ladder.serve(level, job)

    def _tally(self, arrival: Arrival) -> _Tally:
        name = arrival.sla.policy
        if name is None:
            return self.tallies.get(DEFAULT.name) or next(iter(self.tallies.values()))
        if name not in self.tallies:
            raise NotFound(f"no policy {name!r}; there are: {', '.join(sorted(self.tallies))}")
        return self.tallies[name]

    def _finished(self, level: str, job: Job) -> None:
        tally, decision = self._decided.pop(id(job))
        predicted, card = decision.predicted, self._cards[level]
        assert predicted is not None, "a served request was predicted"
        ttft = 1000.0 * (job.first - job.arrived)
        latency = 1000.0 * (job.done - job.arrived)
        tpot = (latency - ttft) / (job.output_tokens - 1) if job.output_tokens > 1 else None
        self._predictor.observe(self._model, level, predicted, ttft_ms=ttft, tpot_ms=tpot)
        costs = Costs(
            ttft, tpot, latency, predicted.memory_mb, card.perplexity_ratio, card.top1_agreement
        )
        broken = excess(decision.budget.bounds(), costs)
        tally.met += not broken
        tally.missed.update(broken.keys())
        tally.levels[level] += 1
        tally.tokens += job.output_tokens
        tally.weighted_ratio += card.perplexity_ratio * job.output_tokens
        tally.ttft_ms.append(ttft)
        tally.latency_ms.append(latency)
        if tpot is not None:
            tally.tpot_ms.append(tpot)


def _percentiles(values: list[float]) -> dict[str, float]:
    """Nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        f"p{rank}": round(ordered[min(len(ordered) - 1, rank * len(ordered) // 100)], 2)
        for rank in (50, 95)
    }
