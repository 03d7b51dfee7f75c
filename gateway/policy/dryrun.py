"""Old policies against new ones on the same recorded traffic, before anything is activated. Pure.

Both sides start from the same ladder; what differs afterwards is what the new policies do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.policy.matching import RequestFacts, Table
from gateway.policy.policy import Policy
from gateway.policy.replay import Outcome, PolicyReport, Replayed, replayed
from gateway.policy.trace import Arrival
from gateway.variants.variant import LadderSnapshot


@dataclass(frozen=True, slots=True)
class Change:
    """A request that another level serves under the new policies; None: refused."""

    request: int
    time_s: float
    old: Outcome
    new: Outcome

    def json(self) -> dict[str, Any]:
        return {
            "request": self.request,
            "time_s": round(self.time_s, 6),
            "policy": {"old": self.old.policy, "new": self.new.policy},
            "level": {"old": self.old.level, "new": self.new.level},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both runs of a trace, and the requests that change level.

    Attributes:
        as_recorded: share of the requests for which the old policies choose the level that the
            trace says served it: how far the simulation is to be trusted. None: not recorded.
    """

    old: Replayed
    new: Replayed
    changes: tuple[Change, ...]
    as_recorded: float | None

    @property
    def moves(self) -> list[tuple[str | None, str | None, int]]:
        """From which level to which, and how many requests; the most first."""
        counted = Counter((change.old.level, change.new.level) for change in self.changes)
        return [(old, new, count) for (old, new), count in counted.most_common()]

    def policies(self) -> Iterator[tuple[str, PolicyReport | None, PolicyReport | None]]:
        """Every policy that had requests on either side, by name."""
        old = {report.policy: report for report in self.old.reports}
        new = {report.policy: report for report in self.new.reports}
        for name in sorted(old.keys() | new.keys()):
            yield name, old.get(name), new.get(name)

    def json(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "total": {"old": self.old.total.json(), "new": self.new.total.json()},
            "policies": [
                {
                    "policy": name,
                    "old": old.json() if old is not None else None,
                    "new": new.json() if new is not None else None,
                }
                for name, old, new in self.policies()
            ],
            "as_recorded": self.as_recorded,
            "moves": [
                {"from": old, "to": new, "requests": count} for old, new, count in self.moves
            ],
            "changes": [change.json() for change in self.changes],
        }


def compare(
    arrivals: Sequence[Arrival], old: Table, new: Table, ladder: LadderSnapshot, only: str | None
) -> Comparison:
    """Run the trace twice.

    Args:
        only: every request falls under this policy; where a side has none of that name, under what
            matches it there. None: see `policy_of`.
    """
    before = replayed(arrivals, old.ordered(), _choose(old, ladder, only), ladder)
    after = replayed(arrivals, new.ordered(), _choose(new, ladder, only), ladder)
    pairs = zip(before.outcomes, after.outcomes, strict=True)
    changes = tuple(
        Change(number, arrivals[number].time_s, was, now)
        for number, (was, now) in enumerate(pairs)
        if was.level != now.level
    )
    return Comparison(before, after, changes, _as_recorded(arrivals, before))


def policy_of(arrival: Arrival, table: Table, model: str) -> Policy:
    """The policy a recorded request falls under: the one it named, else the one it fell under if
    that matches by headers or metadata, which no trace holds, else what matches its key, path,
    model and hour."""
    named, recorded = arrival.sla.policy, table.policies.get(arrival.policy or "")
    if named is not None and named in table.policies:
        return table.policies[named]
    if recorded is not None and (recorded.match.header or recorded.match.metadata):
        return recorded
    facts = RequestFacts(arrival.key, arrival.path, arrival.model or model, now=arrival.at)
    return table.match(facts)


def _choose(table: Table, ladder: LadderSnapshot, only: str | None) -> Callable[[Arrival], Policy]:
    fixed = table.policies.get(only) if only is not None else None
    if fixed is not None:
        return lambda _: fixed
    return lambda arrival: policy_of(arrival, table, ladder.model)


def _as_recorded(arrivals: Sequence[Arrival], run: Replayed) -> float | None:
    pairs = [
        arrival.level == outcome.level
        for arrival, outcome in zip(arrivals, run.outcomes, strict=True)
        if arrival.level is not None
    ]
    return sum(pairs) / len(pairs) if pairs else None
