"""Which policy a request falls under."""

from __future__ import annotations

from fastapi import Request

from gateway.api.auth import Caller
from gateway.api.deps import Services
from gateway.api.prepare import Wanted
from gateway.policy.policy import Policy
from gateway.policy.store import RequestFacts


def policy_for(request: Request, services: Services, caller: Caller, wanted: Wanted) -> Policy:
    """The policy it names, else the most specific that matches.

    Raises:
        NotFound: no policy of that name. Forbidden: it is reserved for other keys, or the caller's
            key is bound to other policies.
    """
    facts = RequestFacts(
        api_key=caller.key, path=request.url.path, model=wanted.model, headers=request.headers
    )
    return services.policies.match(facts, named=wanted.sla.policy)
