"""What a policy takes over from the one it extends. Pure.

A child has every field of its parent that it does not write itself; a field it writes replaces the
parent's, a bound too, and `null` lifts the parent's bound. A parent may extend another. `match` is
never inherited: whom a policy applies to is its own, or child and parent would be rivals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from gateway.policy.policy import Policy

OWN: Final = frozenset({"name", "match", "extends"})


class BrokenChain(Exception):
    """`extends` leads nowhere, or in a circle. The message is for whoever wrote the policy."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def lineage(policy: Policy, policies: Mapping[str, Policy]) -> list[Policy]:
    """The policy, its parent, its parent's parent, and so on.

    Raises:
        BrokenChain: naming the policy whose `extends` is at fault.
    """
    line = [policy]
    names = [policy.name]
    while (parent := line[-1].extends) is not None:
        if parent in names:
            circle = " → ".join([*names[names.index(parent) :], parent])
            raise BrokenChain(line[-1].name, f"a policy cannot extend itself: {circle}")
        if parent not in policies:
            known = ", ".join(sorted(policies))
            raise BrokenChain(line[-1].name, f"no policy {parent!r}; there are: {known}")
        line.append(policies[parent])
        names.append(parent)
    return line


def resolved(policy: Policy, policies: Mapping[str, Policy]) -> Policy:
    """The policy with everything that it inherits; itself when it extends none.

    Raises:
        BrokenChain.
    """
    if policy.extends is None:
        return policy
    return _merged(lineage(policy, policies))


def _merged(line: Iterable[Policy]) -> Policy:
    """The first of a lineage, with what the others give it."""
    first, *others = line
    fields: dict[str, Any] = {}
    for ancestor in reversed(others):
        fields |= {name: getattr(ancestor, name) for name in ancestor.model_fields_set - OWN}
    fields |= {name: getattr(first, name) for name in first.model_fields_set}
    return Policy.model_validate(fields)


def resolve_all(policies: Mapping[str, Policy]) -> tuple[dict[str, Policy], dict[str, BrokenChain]]:
    """Every policy with what it inherits, and those whose chain is broken.

    These (two replicas may have changed parent and child at once) are as if they extended nothing,
    so that whom they bind stays bound.
    """
    found: dict[str, Policy] = {}
    broken: dict[str, BrokenChain] = {}
    for name, policy in policies.items():
        try:
            found[name] = resolved(policy, policies)
        except BrokenChain as error:
            found[name], broken[name] = policy, error
    return found, broken


def parents_first(policies: Mapping[str, Policy]) -> list[Policy]:
    """The policies, each after the one it extends if that is among them.

    Raises:
        BrokenChain: they extend each other in a circle.
    """
    ordered: dict[str, Policy] = {}
    for policy in policies.values():
        inside = {**policies, **_strangers(policies)}
        for ancestor in reversed(lineage(policy, inside)):
            if ancestor.name in policies:
                ordered.setdefault(ancestor.name, ancestor)
    return list(ordered.values())


def children(name: str, policies: Iterable[Policy]) -> list[str]:
    """Who extends `name` directly, sorted."""
    return sorted(policy.name for policy in policies if policy.extends == name)


def _strangers(policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """Stand-ins for parents that are elsewhere."""
    named = {policy.extends for policy in policies.values()} - policies.keys() - {None}
    return {name: Policy(name=name) for name in named if name is not None}
