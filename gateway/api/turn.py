"""From a prepared request to a decision: what it asks, what it meets, and its wish for a slot.

Reads clocks, ladders and memories, so that `decide` need not; starts and counts nothing but what a
decision took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from gateway.api.deps import Services
from gateway.api.sse import Choice
from gateway.api.wanted import Wanted
from gateway.policy import service
from gateway.policy.decide import decide
from gateway.policy.decision import Ask, Decision
from gateway.policy.house import House, Look, Wish
from gateway.policy.moment import Moment
from gateway.policy.policy import Policy
from gateway.policy.promises import Promise
from gateway.variants.variant import LadderSnapshot, State

_TIMES = ("ttft_ms", "tpot_ms", "latency_ms")


def ask_of(wanted: Wanted) -> Ask:
    """What is decided on: of several prompts, the longest."""
    return Ask(
        model=wanted.model,
        prompt_tokens=max(len(prompt) for prompt in wanted.prompts),
        max_tokens=wanted.sampling.max_tokens,
        pinned_level=wanted.pinned,
        sla=wanted.sla,
    )


def make_decision(
    services: Services, ask: Ask, policy: Policy, look: Look | None = None
) -> tuple[Decision, LadderSnapshot]:
    """Decide on the ladder, the queue and the promises as they are now; counts nothing and starts
    nothing. Without `look`: as if `ask` came in now."""
    look = look or services.admission.look(ask.model, policy.priority)
    snapshot = services.pool.glance(ask.model)
    house = services.admission.house(ask.model)
    ask = replace(ask, moment=_moment(house, ask, policy, look))
    seen = service.beside(snapshot, look.ahead, ask)
    predict = services.predictor.under(policy.name, time.perf_counter())
    return decide(ask, policy, seen, predict), snapshot


def wish_for(
    services: Services, wanted: Wanted, policy: Policy, key: str | None, arrived: float
) -> Wish:
    """The request as one that wants a slot."""
    ask = ask_of(wanted)

    def decide_now(look: Look) -> Decision:
        began = time.perf_counter()
        decision, _ = make_decision(services, ask, policy, look)
        services.metrics.decision_took(wanted.model, time.perf_counter() - began)
        return decision

    bounds = {name: _tighter(getattr(wanted.sla, name), getattr(policy, name)) for name in _TIMES}
    due_ms = min(bounds["ttft_ms"], bounds["latency_ms"])
    on_miss = wanted.sla.on_miss or policy.on_miss
    return Wish(
        model=wanted.model,
        key=key,
        priority=policy.priority,
        sequences=wanted.sequences,
        arrived=arrived,
        decide=decide_now,
        deadline=arrived + due_ms / 1000.0,
        patient=on_miss == "nearest" or not any(bound < math.inf for bound in bounds.values()),
    )


def remember(services: Services, wanted: Wanted, policy: Policy, decision: Decision) -> None:
    """What later decisions are to know of this one, which will be served."""
    level, case = decision.level, decision.case
    if level is None or case is None:
        return
    house, now = services.admission.house(wanted.model), time.perf_counter()
    services.predictor.arrived(now)
    if decision.code in ("fits", "steady"):
        house.recent.chose(_kind(case.ask, policy), level, now)
    facts = case.snapshot.level(level)
    if facts is not None and facts.state is State.STORED:
        house.recent.loads(now)


@contextmanager
def promised(
    services: Services,
    wanted: Wanted,
    decision: Decision,
    arrived: float,
    choices: Sequence[Choice],
) -> Iterator[None]:
    """Make known, while the block runs, which times the request is to keep."""
    bounds = {
        name: bound for name, bound in decision.budget.bounds() if name not in decision.misses
    }
    tpot_ms, latency_ms = bounds.get("tpot_ms"), bounds.get("latency_ms")
    predicted = decision.predicted
    if decision.level is None or predicted is None or (tpot_ms is None and latency_ms is None):
        yield
        return

    def progress() -> tuple[int, float | None]:
        slowest = min(choices, key=lambda choice: choice.tokens)
        return slowest.tokens, slowest.first_at

    promises = services.admission.house(wanted.model).promises
    promise = Promise(
        level=decision.level,
        arrived=arrived,
        tokens=wanted.sampling.max_tokens,
        pace_ms=predicted.tpot_ms,
        tpot_ms=tpot_ms,
        latency_ms=latency_ms,
        progress=progress,
    )
    promises.begin(promise)
    try:
        yield
    finally:
        promises.end(promise)


def _moment(house: House, ask: Ask, policy: Policy, look: Look) -> Moment:
    recent, now = house.recent, look.now
    bearable = house.promises.bearable(now)
    return Moment(
        waited_ms=1000.0 * look.waited_s,
        token_ms=math.inf if look.forced else bearable.token_ms,
        slack_ms=math.inf if look.forced else bearable.slack_ms,
        expected=recent.expected(policy.name, policy.expected_requests, now),
        recent=recent.level(_kind(ask, policy), now),
        settling=recent.settling(now),
    )


def _kind(ask: Ask, policy: Policy) -> Hashable:
    """Requests of one kind are to get one level: same policy, objective and bounds."""
    return (policy.name, ask.sla.objective, ask.sla.bounds())


def _tighter(asked: float | None, outer: float | None) -> float:
    return min(math.inf if asked is None else asked, math.inf if outer is None else outer)
