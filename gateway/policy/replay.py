"""What a policy would have done with recorded traffic: the real `decide` on a simulated ladder.

Pure: no clock, no files. Where a trace does not hold `max_tokens`, each request asks for as many
tokens as it got. Levels queue in the simulation; the gateway's own queue, its quotas and what it
spares for running promises are not part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import NotFound
from gateway.policy.budget import Costs, excess
from gateway.policy.decide import Ask, Decision, decide
from gateway.policy.moment import Moment
from gateway.policy.policy import DEFAULT, Policy
from gateway.policy.predictor import GUESSED_PREFILL_MS, GUESSED_TPOT_MS, Predictor
from gateway.policy.recent import Recent
from gateway.policy.simulate import Job, Ladder
from gateway.policy.trace import Arrival
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot, State


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
        compute_ms_per_token: what the served answers cost, as their levels' cards have it: the time
            that prompts and tokens take alone on this host, per generated token.
        memory_mb_s_per_token: weights and KV cache of the level, times how long it worked on the
            answer, per generated token.
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
    compute_ms_per_token: float | None
    memory_mb_s_per_token: float | None
    ttft_ms: Mapping[str, float]
    tpot_ms: Mapping[str, float]
    latency_ms: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((name, getattr(self, name)) for name in self.__slots__)
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request: its policy, and the level that served it (None: refused)."""

    policy: str
    level: str | None
    code: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """One run of a trace.

    Attributes:
        reports: one per policy that had requests, in the order the policies were given.
        total: all requests together, under the name `all`.
        outcomes: one per request, in order of time.
    """

    reports: tuple[PolicyReport, ...]
    total: PolicyReport
    outcomes: tuple[Outcome, ...]


def replay(
    arrivals: Iterable[Arrival], policies: Sequence[Policy], ladder: LadderSnapshot
) -> tuple[PolicyReport, ...]:
    """Run `arrivals`, in order of time, against `ladder` as it is at the beginning.

    A request goes to the policy its `sla` names, else to `default`, else to the first policy given.
    One report per policy that had requests, in the order given.

    Raises:
        NotFound: a request names a policy that is not among `policies`.
    """
    named = {policy.name: policy for policy in policies}

    def choose(arrival: Arrival) -> Policy:
        name = arrival.sla.policy
        if name is None:
            return named.get(DEFAULT.name) or policies[0]
        if name not in named:
            raise NotFound(f"no policy {name!r}; there are: {', '.join(sorted(named))}")
        return named[name]

    return replayed(arrivals, policies, choose, ladder).reports


def replayed(
    arrivals: Iterable[Arrival],
    policies: Sequence[Policy],
    choose: Callable[[Arrival], Policy],
    ladder: LadderSnapshot,
) -> Replayed:
    """As `replay`, each request under the policy, one of `policies`, that `choose` gives it."""
    run = _Run(policies, ladder)
    for arrival in arrivals:
        run.arrive(arrival, choose(arrival))
    run.ladder.drain()
    return Replayed(
        tuple(tally.report() for tally in run.tallies.values() if tally.requests),
        run.total.report(),
        tuple(run.outcomes),
    )


@dataclass(slots=True)
class _Tally:
    """What is counted for one policy, or for all."""

    policy: str
    requests: int = 0
    waited: int = 0
    met: int = 0
    tokens: int = 0
    weighted_ratio: float = 0.0
    compute_ms: float = 0.0
    memory_mb_s: float = 0.0
    levels: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)

    def report(self) -> PolicyReport:
        served = sum(self.levels.values())
        return PolicyReport(
            policy=self.policy,
            requests=self.requests,
            served=served,
            waited=self.waited,
            attainment=self.met / self.requests if self.requests else 0.0,
            missed=dict(self.missed),
            levels={level: count / served for level, count in self.levels.most_common()},
            refusals=dict(self.refusals),
            mean_ppl_ratio=self._per_token(self.weighted_ratio),
            compute_ms_per_token=self._per_token(self.compute_ms),
            memory_mb_s_per_token=self._per_token(self.memory_mb_s),
            ttft_ms=_percentiles(self.ttft_ms),
            tpot_ms=_percentiles(self.tpot_ms),
            latency_ms=_percentiles(self.latency_ms),
        )

    def refuse(self, code: str) -> None:
        self.refusals[code] += 1

    def serve(self, level: str, job: Job, done: _Done) -> None:
        self.met += not done.broken
        self.missed.update(done.broken.keys())
        self.levels[level] += 1
        self.tokens += job.output_tokens
        self.weighted_ratio += done.ppl_ratio * job.output_tokens
        self.compute_ms += done.compute_ms
        self.memory_mb_s += done.memory_mb_s
        self.ttft_ms.append(done.ttft_ms)
        self.latency_ms.append(done.latency_ms)
        if done.tpot_ms is not None:
            self.tpot_ms.append(done.tpot_ms)

    def _per_token(self, amount: float) -> float | None:
        return amount / self.tokens if self.tokens else None


@dataclass(frozen=True, slots=True)
class _Done:
    """One served request, measured on the simulated clock."""

    ttft_ms: float
    tpot_ms: float | None
    latency_ms: float
    ppl_ratio: float
    compute_ms: float
    memory_mb_s: float
    broken: Mapping[str, float]


class _Run:
    """One replay: the ladder, the predictor that learns from it, the tallies."""

    def __init__(self, policies: Sequence[Policy], start: LadderSnapshot) -> None:
        self.tallies = {policy.name: _Tally(policy.name) for policy in policies}
        self.total = _Tally("all")
        self.outcomes: list[Outcome] = []
        self.ladder = Ladder(start, self._finished)
        self._cards = {facts.level: facts.card for facts in start.levels}
        self._model = start.model
        self._predictor = Predictor()
        self._recent = Recent()
        self._decided: dict[int, tuple[int, Decision]] = {}  # by job: max_tokens and the decision

    def arrive(self, arrival: Arrival, policy: Policy) -> None:
        self.ladder.advance(arrival.time_s)
        most = max(arrival.max_tokens or 0, arrival.output_tokens)
        decision = decide(
            self._ask(arrival, policy, most),
            policy,
            self.ladder.snapshot(),
            self._predictor.under(policy.name, arrival.time_s),
        )
        tallies = (self.tallies[policy.name], self.total)
        for tally in tallies:
            tally.requests += 1
            tally.waited += decision.action == "wait"
        if decision.action != "wait" and decision.build is not None:
            self.ladder.build(decision.build)
        if decision.warm is not None:
            self.ladder.warm(decision.warm)
        level = decision.build if decision.action == "wait" else decision.level
        if decision.action == "reject" or level is None:
            for tally in tallies:
                tally.refuse(decision.code)
            self.outcomes.append(Outcome(policy.name, None, decision.code))
            return
        self.outcomes.append(Outcome(policy.name, level, decision.code))
        self._remember(decision, _kind(arrival, policy), level)
        self._predictor.arrived(arrival.time_s)
        job = Job(arrival.time_s, arrival.prompt_tokens, arrival.output_tokens)
        self._decided[id(job)] = (most, decision)
        self.ladder.serve(level, job)

    def _ask(self, arrival: Arrival, policy: Policy, most: int) -> Ask:
        """With what happened lately on the simulated clock."""
        now, recent = arrival.time_s, self._recent
        recent.came(policy.name, now)
        moment = Moment(
            expected=recent.expected(policy.name, policy.expected_requests, now),
            recent=recent.level(_kind(arrival, policy), now),
            settling=recent.settling(now),
        )
        return Ask(self._model, arrival.prompt_tokens, most, arrival.pinned, arrival.sla, moment)

    def _remember(self, decision: Decision, kind: Hashable, level: str) -> None:
        now = self.ladder.now
        if decision.code in ("fits", "steady"):
            self._recent.chose(kind, level, now)
        facts = decision.case.snapshot.level(level) if decision.case is not None else None
        if facts is not None and facts.state is State.STORED:
            self._recent.loads(now)

    def _finished(self, level: str, job: Job) -> None:
        most, decision = self._decided.pop(id(job))
        predicted = decision.predicted
        assert predicted is not None, "a served request was predicted"
        done = _measured(job, decision, self._cards[level])
        for tally in (self.tallies[decision.policy], self.total):
            tally.serve(level, job, done)
        self._predictor.lengths.learn(decision.policy, job.output_tokens, most)
        self._predictor.observe(
            self._model,
            level,
            predicted,
            ttft_ms=done.ttft_ms,
            tpot_ms=done.tpot_ms,
            latency_ms=done.latency_ms,
            tokens=job.output_tokens,
        )


def _kind(arrival: Arrival, policy: Policy) -> Hashable:
    """Requests of one kind are to get one level."""
    return (policy.name, arrival.sla.objective, arrival.sla.bounds())


def _measured(job: Job, decision: Decision, card: Card) -> _Done:
    ttft = 1000.0 * (job.first - job.arrived)
    latency = 1000.0 * (job.done - job.arrived)
    tpot = (latency - ttft) / (job.output_tokens - 1) if job.output_tokens > 1 else None
    memory = decision.predicted.memory_mb if decision.predicted is not None else 0.0
    costs = Costs(ttft, tpot, latency, memory, card.perplexity_ratio, card.top1_agreement)
    prefill = card.prefill_ms(job.prompt_tokens) or GUESSED_PREFILL_MS * job.prompt_tokens
    step = card.tpot_ms(1) or GUESSED_TPOT_MS
    return _Done(
        ttft_ms=ttft,
        tpot_ms=tpot,
        latency_ms=latency,
        ppl_ratio=card.perplexity_ratio,
        compute_ms=prefill + step * (job.output_tokens - 1),
        memory_mb_s=memory * (prefill + latency - ttft) / 1000.0,
        broken=excess(decision.budget.bounds(), costs),
    )


def _percentiles(values: list[float]) -> dict[str, float]:
    """Nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        f"p{rank}": round(ordered[min(len(ordered) - 1, rank * len(ordered) // 100)], 2)
        for rank in (50, 95)
    }
