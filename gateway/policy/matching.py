"""Which policy a request falls under: one immutable table of the policies in force. Pure.

Matching costs a few microseconds however many policies there are: which policies can match at all
for a key, a path and a model is found once and remembered; what is left to look at for each request
are headers, metadata and the hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from gateway.errors import Forbidden, NotFound
from gateway.policy.canary import Split
from gateway.policy.policy import DEFAULT, Policy

_REMEMBERED: Final = 1024  # callers × paths × models


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a policy may match on, and what a rollout is split by.

    Attributes:
        api_key: the key's name, None when no keys are in use.
        headers: by name, compared without case; values exactly.
        metadata: the request's own, values compared exactly.
        user: whom the caller says it acts for, if it does.
        now: when, in Unix seconds.
        seed: of this request alone; splits callers that cannot be told apart.
    """

    api_key: str | None
    path: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    now: float = 0.0
    seed: str = ""


class Table:
    """The policies in force, with all they inherit.

    Args:
        policies: by name; `default` is among them.
        splits: by name, where a candidate is being tried on a share of the requests.
    """

    def __init__(
        self, policies: Mapping[str, Policy], splits: Mapping[str, Split] | None = None
    ) -> None:
        self.policies: Mapping[str, Policy] = MappingProxyType(dict(policies))
        self.splits: Mapping[str, Split] = MappingProxyType(dict(splits or {}))
        self._matching = [policy for policy in self.ordered() if _conditions(policy)]
        self._candidates: dict[tuple[str | None, str, str], tuple[Policy, ...]] = {}

    def ordered(self) -> list[Policy]:
        """Every policy, the first to match first; `default` last."""
        return sorted(self.policies.values(), key=_order)

    def match(self, facts: RequestFacts, named: str | None = None) -> Policy:
        """The policy of a request: the one it names, else the most specific that matches it, else
        `default`; while a candidate for it is tried, perhaps the candidate.

        A caller whose key some policy lists may name only policies that list it: an operator who
        binds a key to bounds must not be escaped by a name, at any hour. Headers, metadata and
        paths are chosen by the caller, so the policies that match only them bind nobody.

        Raises:
            NotFound: no policy is called `named`; the message lists those that are.
            Forbidden: `named` is reserved for other API keys, or the caller's key is bound to
                others; the message lists those.
        """
        policy = self._first(facts) if named is None else self._named(facts, named)
        if self.splits and (split := self.splits.get(policy.name)) is not None:
            return split.choose(facts.api_key, facts.user, facts.seed)
        return policy

    def get(self, name: str) -> Policy:
        """
        Raises:
            NotFound: the message lists the names there are.
        """
        policy = self.policies.get(name)
        if policy is None:
            known = ", ".join(sorted(self.policies))
            raise NotFound(f"no policy {name!r}; there are: {known}", param="sla.policy")
        return policy

    def _named(self, facts: RequestFacts, name: str) -> Policy:
        policy = self.get(name)
        if facts.api_key is not None:
            self._check_key(policy, facts.api_key)
        return policy

    def _first(self, facts: RequestFacts) -> Policy:
        key = (facts.api_key, facts.path, facts.model)
        candidates = self._candidates.get(key)
        if candidates is None:
            candidates = self._remember(key)
        headers: Mapping[str, str] | None = None
        for policy in candidates:
            match = policy.match
            if match.header:
                if headers is None:
                    headers = {name.lower(): value for name, value in facts.headers.items()}
                if not _holds(match.header, headers, lower=True):
                    continue
            if match.metadata and not _holds(match.metadata, facts.metadata):
                continue
            if match.hours is None or match.hours.hold(facts.now):
                return policy
        return self.policies[DEFAULT.name]

    def _remember(self, key: tuple[str | None, str, str]) -> tuple[Policy, ...]:
        api_key, path, model = key
        found = tuple(
            policy
            for policy in self._matching
            if (not policy.match.api_key or api_key in policy.match.api_key)
            and policy.match.path in (None, path)
            and policy.match.model in (None, model)
        )
        if len(self._candidates) >= _REMEMBERED:
            self._candidates.clear()
        self._candidates[key] = found
        return found

    def _check_key(self, policy: Policy, key: str) -> None:
        keys = policy.match.api_key
        if key in keys:
            return
        own = sorted(other.name for other in self.policies.values() if key in other.match.api_key)
        if own:
            raise Forbidden(
                f"policy {policy.name!r} is not for this API key; it may name: {', '.join(own)}",
                param="sla.policy",
            )
        if keys:
            raise Forbidden(f"policy {policy.name!r} is not for this API key", param="sla.policy")


def _holds(wanted: Mapping[str, str], given: Mapping[str, str], *, lower: bool = False) -> bool:
    items: Iterable[tuple[str, str]] = wanted.items()
    return all(given.get(name.lower() if lower else name) == value for name, value in items)


def _conditions(policy: Policy) -> int:
    match = policy.match
    given = bool(match.api_key) + (match.path is not None) + (match.model is not None)
    return given + len(match.header) + len(match.metadata) + (match.hours is not None)


def _order(policy: Policy) -> tuple[bool, int, bool, int, int, bool, bool, str]:
    """Most conditions first; among equals a key counts more than a header, more than metadata, more
    than a model, more than a path, more than hours; `default` comes last."""
    match = policy.match
    return (
        policy.name == DEFAULT.name,
        -_conditions(policy),
        not match.api_key,
        -len(match.header),
        -len(match.metadata),
        match.model is None,
        match.path is None,
        policy.name,
    )
