"""The short way to a generation: pure ASGI, past routing and dependencies, which would cost as much
as everything else that a request needs before its engine.

The router has the same endpoints, for the documentation and for an app that is mounted under a
prefix; both ways begin and end in the same code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, cast

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.auth import ANYONE, Caller
from gateway.api.deps import Services
from gateway.api.generate import Generation
from gateway.api.match import policy_for
from gateway.api.prepare import above_floors, prepare, read_sla
from gateway.api.problems import render
from gateway.api.schemas import ChatBody, CompletionBody, parse, read
from gateway.errors import PressgateError
from gateway.metrics import NONE, Finished

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
_SHAPES: Final[Mapping[str, type[ChatBody | CompletionBody]]] = MappingProxyType(
    {CHAT: ChatBody, COMPLETIONS: CompletionBody}
)


async def begin(
    services: Services, shape: type[ChatBody | CompletionBody], scope: Scope, receive: Receive
) -> Generation:
    """Read, bound and match one request; what it returns is ready to be served.

    Requests that never get that far count under no model; the generation counts all others.

    Raises:
        PressgateError: the request cannot be served.
    """
    arrived = time.perf_counter()
    try:
        headers = _headers(scope)
        body = parse(await read(headers, receive), shape)
        # Set by `AuthMiddleware`; an app without it is open.
        caller = cast(Caller, scope.get("caller", ANYONE))
        sla = above_floors(read_sla(body.sla, headers), caller.floors)
        wanted = await prepare(body, services, sla)
        policy = policy_for(scope["path"], headers, services, caller, wanted)
        generation = Generation(services, wanted, policy, caller.key, arrived)
        generation.trace(headers)
        return generation
    except PressgateError as error:
        services.metrics.request_finished(Finished(NONE, NONE, NONE, error.status))
        raise


class FrontMiddleware:
    """Serves generations itself and hands everything else on."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shape = None
        if scope["type"] == "http" and scope["method"] == "POST":
            shape = _SHAPES.get(scope["path"])
        if shape is None:
            await self._app(scope, receive, send)
            return
        try:
            generation = await begin(self._services, shape, scope, receive)
            await generation(scope, receive, send)
        except PressgateError as error:
            await render(error)(scope, receive, send)


def _headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; of several of one name the first."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in reversed(scope["headers"])
    }
