"""From policies as they are written, and their histories, to the table in force; what may change
them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.errors import Conflict, InvalidRequest
from gateway.policy.canary import Split
from gateway.policy.inherit import BrokenChain, lineage, resolve_all, resolved
from gateway.policy.matching import Table
from gateway.policy.parse import parse_policy
from gateway.policy.policy import Policy
from gateway.policy.versions import History, Version


@dataclass(frozen=True, slots=True)
class Force:
    """
    Attributes:
        trials: the version of each candidate that is being tried, by policy.
        faults: what could not be put in force as written, for the log.
    """

    table: Table
    trials: Mapping[str, int]
    faults: tuple[str, ...]


def in_force(
    written: Mapping[str, Policy], histories: Mapping[str, History], before: Table
) -> Force:
    """The table that follows `before`.

    What is unchanged stays the same object: requests under way are counted by it.
    """
    active, broken = resolve_all(written)
    faults = [f"policy {name} inherits nothing: {error}" for name, error in broken.items()]
    for name, policy in before.policies.items():
        if active.get(name) == policy:
            active[name] = policy
    splits, trials = {}, {}
    for name, history in histories.items():
        trial = history.trial
        if trial is None or name not in active:
            continue
        try:
            candidate = _candidate(name, trial, written)
        except (InvalidRequest, BrokenChain) as error:
            faults.append(f"the candidate for policy {name} is left out: {error}")
            continue
        known = before.splits.get(name)
        if known is not None and known.canary == candidate:
            candidate = known.canary
        assert trial.plan is not None, "a trial has a plan"
        salt = f"{name} {trial.of or trial.version}"
        splits[name] = Split(active[name], candidate, trial.plan, salt)
        trials[name] = trial.version
    return Force(Table(active, splits), trials, tuple(faults))


def check_chain(policy: Policy, written: Mapping[str, Policy]) -> None:
    """
    Raises:
        InvalidRequest: the policy extends none that there is, or in the end itself.
    """
    try:
        lineage(policy, {**written, policy.name: policy})
    except BrokenChain as error:
        raise InvalidRequest(f"extends: {error}", param="extends") from None


def check_without(
    name: str, configured: Mapping[str, Policy], stored: Mapping[str, Policy]
) -> None:
    """
    Raises:
        Conflict: without what is stored of `name`, others would extend what they cannot.
    """
    others = {other: policy for other, policy in stored.items() if other != name}
    _, broken = resolve_all({**configured, **others})
    heirs = ", ".join(sorted(broken.keys() - {name}))
    if heirs:
        raise Conflict(f"policy {name!r} is extended by {heirs}; change or delete those first")


def _candidate(name: str, trial: Version, written: Mapping[str, Policy]) -> Policy:
    """With what it inherits."""
    given = parse_policy(name, trial.document)
    return resolved(given, {**written, name: given})
