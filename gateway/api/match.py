"""Which policy a request falls under."""

from __future__ import annotations

import time
from collections.abc import Mapping
from secrets import token_hex

from gateway.api.auth import Caller
from gateway.api.deps import Services
from gateway.api.wanted import Wanted
from gateway.policy.matching import RequestFacts
from gateway.policy.policy import Policy


def policy_for(
    path: str, headers: Mapping[str, str], services: Services, caller: Caller, wanted: Wanted
) -> Policy:
    """The policy it names, else the most specific that matches.

    Raises:
        NotFound: no policy of that name. Forbidden: it is reserved for other keys, or the caller's
            key is bound to other policies.
    """
    facts = RequestFacts(
        api_key=caller.key,
        path=path,
        model=wanted.model,
        headers=headers,
        metadata=wanted.metadata,
        user=wanted.user,
        now=time.time(),
        seed=token_hex(8),
    )
    return services.policies.match(facts, named=wanted.sla.policy)
