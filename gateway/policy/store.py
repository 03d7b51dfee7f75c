"""The policies in force: configured ones, overlaid by those set over HTTP.

Reads come from one immutable table that is replaced as a whole, so a request sees either the old
policies or the new ones. Writes are persisted as documents first, then take effect; other replicas
follow through the document store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError

from cache.documents import Documents
from cache.errors import CacheError
from gateway.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unavailable
from gateway.policy.policy import DEFAULT, Policy

log = logging.getLogger(__name__)

NAMESPACE: Final = "policies"
MAX_STORED: Final = 256


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a policy may match on. `api_key` is the key's name, None when no keys are in use;
    header names are compared without case, values exactly."""

    api_key: str | None
    path: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)


def parse_policy(name: str, document: object) -> Policy:
    """A policy from outside.

    Raises:
        InvalidRequest: names each field at fault and what is allowed there.
    """
    if not isinstance(document, dict):
        raise InvalidRequest("a policy is an object of fields", param="body")
    if document.get("name", name) != name:
        raise InvalidRequest(f"name: must be {name!r}, as in the path", param="name")
    try:
        return Policy.model_validate({**document, "name": name})
    except ValidationError as error:
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InvalidRequest("; ".join(problems(error)), param=first) from None


def problems(error: ValidationError) -> list[str]:
    """One line per fault of a policy: the field, what is wrong, what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            inside = item["loc"][0] == "match" and len(item["loc"]) > 1
            known = Policy.model_fields["match"].default.__class__ if inside else Policy
            lines.append(f"{where}: unknown; allowed are {', '.join(known.model_fields)}")
        else:
            lines.append(f"{where}: {item['msg']}")
    return lines


class PolicyStore:
    """Policies by name. Owned by the event loop.

    Args:
        configured: from the configuration; `default` is added when it is not among them.
        documents: where policies set over HTTP live.
    """

    def __init__(self, configured: Iterable[Policy], documents: Documents) -> None:
        self._configured = {policy.name: policy for policy in (DEFAULT, *configured)}
        self._documents = documents
        self._writing = asyncio.Lock()
        self._swap({})

    async def load(self) -> None:
        """Read what is stored and follow every later change, made here or by another replica."""
        await self._documents.watch(NAMESPACE, self._changed)
        for name, document in (await self._documents.all(NAMESPACE)).items():
            self._changed(name, document)

    def match(self, facts: RequestFacts, named: str | None = None) -> Policy:
        """The policy of a request: the one it names, else the most specific that matches it, else
        `default`.

        A caller whose key some policy lists may name only policies that list it: an operator who
        binds a key to bounds must not be escaped by a name. Headers and paths are chosen by the
        caller, so the policies that match them bind nobody.

        Raises:
            NotFound: no policy is called `named`; the message lists those that are.
            Forbidden: `named` is reserved for other API keys, or the caller's key is bound to
                others; the message lists those.
        """
        if named is not None:
            policy = self.get(named)
            if facts.api_key is not None:
                self._check_key(policy, facts.api_key)
            return policy
        headers: Mapping[str, str] = {}
        if self._by_header:
            headers = {name.lower(): value for name, value in facts.headers.items()}
        fitting = (policy for policy in self._matching if _matches(policy, facts, headers))
        return next(fitting, self._active[DEFAULT.name])

    def get(self, name: str) -> Policy:
        """
        Raises:
            NotFound: the message lists the names there are.
        """
        policy = self._active.get(name)
        if policy is None:
            known = ", ".join(sorted(self._active))
            raise NotFound(f"no policy {name!r}; there are: {known}", param="sla.policy")
        return policy

    def list(self) -> list[Policy]:
        """Every policy, the first to match first; `default` last."""
        return sorted(self._active.values(), key=_order)

    async def put(self, policy: Policy) -> None:
        """Create or replace a policy, here and on every replica. A configured one is overridden.

        Raises:
            Conflict: too many policies. Unavailable: it cannot be stored; nothing has changed.
        """
        async with self._writing:
            if policy.name not in self._stored and len(self._stored) >= MAX_STORED:
                raise Conflict(f"there are {MAX_STORED} stored policies already; delete some")
            document = policy.model_dump(mode="json", exclude_defaults=True)
            await self._persist(self._documents.put(NAMESPACE, policy.name, document))
            self._swap({**self._stored, policy.name: policy})

    async def delete(self, name: str) -> None:
        """Delete a stored policy; a configured one that it overrode is in force again.

        Raises:
            NotFound: there is none of that name. Conflict: it comes from the configuration.
            Unavailable: the deletion cannot be stored; nothing has changed.
        """
        async with self._writing:
            self.get(name)
            if name not in self._stored:
                raise Conflict(
                    f"policy {name!r} comes from the configuration and cannot be deleted; "
                    "it can be overridden"
                )
            await self._persist(self._documents.delete(NAMESPACE, name))
            self._swap({key: value for key, value in self._stored.items() if key != name})

    def _check_key(self, policy: Policy, key: str) -> None:
        keys = policy.match.api_key
        if key in keys:
            return
        own = sorted(other.name for other in self._active.values() if key in other.match.api_key)
        if own:
            raise Forbidden(
                f"policy {policy.name!r} is not for this API key; it may name: {', '.join(own)}",
                param="sla.policy",
            )
        if keys:
            raise Forbidden(f"policy {policy.name!r} is not for this API key", param="sla.policy")

    async def _persist(self, write: Coroutine[Any, Any, object]) -> None:
        try:
            await write
        except (CacheError, OSError) as error:
            raise Unavailable(f"the policy cannot be stored: {error}", retry_after=30) from error

    def _changed(self, name: str, document: dict[str, Any] | None) -> None:
        """The store says that `name` is now `document` (None: deleted)."""
        others = {key: value for key, value in self._stored.items() if key != name}
        if document is not None:
            try:
                others[name] = parse_policy(name, document)
            except InvalidRequest as error:
                log.warning("stored policy %s is left out: %s", name, error.message)
                return
        self._swap(others)

    def _swap(self, stored: dict[str, Policy]) -> None:
        self._stored: Mapping[str, Policy] = MappingProxyType(stored)
        self._active: Mapping[str, Policy] = MappingProxyType(self._configured | stored)
        # Those that match at all, the first to match first.
        self._matching = [policy for policy in self.list() if _conditions(policy)]
        self._by_header = any(policy.match.header for policy in self._matching)


def _matches(policy: Policy, facts: RequestFacts, headers: Mapping[str, str]) -> bool:
    match = policy.match
    return (
        (not match.api_key or facts.api_key in match.api_key)
        and match.path in (None, facts.path)
        and match.model in (None, facts.model)
        and all(headers.get(name.lower()) == value for name, value in match.header.items())
    )


def _conditions(policy: Policy) -> int:
    match = policy.match
    given = bool(match.api_key) + (match.path is not None) + (match.model is not None)
    return given + len(match.header)


def _order(policy: Policy) -> tuple[bool, int, bool, int, bool, str]:
    """Most conditions first; among equals a key counts more than a header, more than a model, more
    than a path; `default` comes last."""
    match = policy.match
    return (
        policy.name == DEFAULT.name,
        -_conditions(policy),
        not match.api_key,
        -len(match.header),
        match.model is None,
        policy.name,
    )
