"""From policies as they are written, and their histories, to the table in force. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.errors import InvalidRequest
from gateway.policy.canary import Split
from gateway.policy.inherit import BrokenChain, resolve_all, resolved
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


def _candidate(name: str, trial: Version, written: Mapping[str, Policy]) -> Policy:
    """With what it inherits."""
    given = parse_policy(name, trial.document)
    return resolved(given, {**written, name: given})
