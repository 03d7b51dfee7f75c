"""The walk of one generation, from decision to last byte, inside one ASGI response.

Everything it takes (permit, lease, sequences) is taken and given back within `__call__`, by one
task, so there is one place to leave from: the end, an error, a timeout or the caller hanging up.
Leaving cancels the sequences within one token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from secrets import token_hex

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api.account import Account
from gateway.api.adapting import Answer, Mover, adapting
from gateway.api.deps import Services
from gateway.api.merge import merged
from gateway.api.problems import InternalError, as_pressgate
from gateway.api.sse import DONE, ChatShape, Choice, Shape, TextShape, error_event
from gateway.api.stream import Stream
from gateway.api.turn import promised, remember, wish_for
from gateway.api.wanted import Wanted
from gateway.engine.base import EngineFailed, GenerationRequest, SequenceFailed, TokenEvent
from gateway.errors import (
    BudgetUnmet,
    InvalidRequest,
    NotFound,
    Overloaded,
    PressgateError,
    Unavailable,
)
from gateway.policy.decision import Decision
from gateway.policy.policy import Policy
from gateway.policy.quota import Taken

log = logging.getLogger(__name__)

_LOAD_SECONDS = 120.0  # longest wait for a level that only has to be loaded
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # reverse proxies must not hold tokens back
]


class ClientGone(Exception):
    """The caller hung up; nobody is left to answer."""


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block as soon as the caller hangs up, and raise `ClientGone` then.

    The request body must have been read: whatever still comes is the end of the connection.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


def refusal(decision: Decision) -> PressgateError:
    """The error that a rejecting decision is answered with."""
    retry = decision.retry_after_s
    extra = {"could_meet": decision.could_meet} if decision.could_meet else {}
    match decision.code:
        case "unknown_level":
            return NotFound(decision.reason, param="model", code="level_not_found")
        case "not_allowed" | "too_large":
            return InvalidRequest(decision.reason, param="model", code=decision.code)
        case "building" | "failed":
            return Unavailable(decision.reason, code=decision.code, retry_after=retry, extra=extra)
        case "busy":
            return Overloaded(decision.reason, code="busy", retry_after=retry, extra=extra)
        case _:
            return BudgetUnmet(decision.reason, param="sla", retry_after=retry, extra=extra)


class Generation:
    """Serves one prepared request; errors before the first byte are raised as `PressgateError`."""

    def __init__(
        self, services: Services, wanted: Wanted, policy: Policy, key: str | None, arrived: float
    ) -> None:
        """`arrived`: `time.perf_counter()` when the request came in; `key`: name of the API key."""
        self._services = services
        self._wanted = wanted
        self._policy = policy
        self._key = key
        self._arrived = arrived
        self._account = Account(services, wanted, policy, arrived, key)
        shape = ChatShape if wanted.chat else TextShape
        self._shape: Shape = shape(wanted.name, wanted.sequences, wanted.include_usage)
        self._started = False
        self._taken: Taken | None = None  # of the key's quota

    def trace(self, headers: Mapping[str, str]) -> None:
        """Go on with the trace that the request's headers name, or begin one."""
        self._account.trace(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = self._account
        try:
            async with (
                until_disconnect(receive),
                asyncio.timeout(self._services.settings.limits.request_timeout_seconds),
            ):
                await self._serve(send)
            account.code = 200
        except ClientGone:
            account.code = 499
        except Exception as error:
            known = as_pressgate(error, prompt="messages" if self._wanted.chat else "prompt")
            if self._taken is not None:
                known.more_headers.update(self._taken.headers)
            account.failed(known)
            self._log(error, known)
            if not self._started:
                raise known from error
            await self._send_last(send, error_event(known) + DONE)
        finally:
            account.close()

    def _log(self, error: Exception, known: PressgateError) -> None:
        """What the caller is not told; once, and with a traceback where the bug is ours."""
        what = "stream broke off" if self._started else "generation failed"
        if isinstance(known, InternalError):
            log.error("%s", what, exc_info=error)
        elif self._started or isinstance(error, EngineFailed | SequenceFailed):
            log.warning("%s: %s: %s", what, type(error).__name__, error)

    async def _serve(self, send: Send) -> None:
        wanted = self._wanted
        most = wanted.prompt_tokens + wanted.sequences * wanted.sampling.max_tokens
        self._taken = await self._services.quotas.take(self._key, most)
        try:
            await self._served(send)
        finally:
            self._settle()

    def _settle(self) -> None:
        """Give back the tokens that were taken from the key's quota and not used; all of them when
        nothing was generated."""
        if self._taken is None:
            return
        generated = sum(choice.tokens for choice in self._account.choices)
        used = self._wanted.prompt_tokens + generated if generated else 0
        self._services.background(self._services.quotas.settle(self._taken, used))

    async def _served(self, send: Send) -> None:
        services, wanted = self._services, self._wanted
        wish = wish_for(services, wanted, self._policy, self._key, self._arrived)
        services.admission.house(wanted.model).recent.came(self._policy.name, self._arrived)
        async with (
            services.admission.admit(self._key),
            services.admission.turn(wish) as decision,
        ):
            wait_s = await self._decided(decision)
            level = decision.level or decision.build
            assert level is not None, "a decision to serve names a level"
            async with (
                services.pool.lease(wanted.model, level, wait_s=wait_s) as engine,
                AsyncExitStack() as stack,
            ):
                self._account.leased()
                choices, requests = self._choices(), self._requests()
                self._account.choices = choices
                events = merged(engine, requests)
                if self._policy.adaptive and wanted.pinned is None:
                    asked = (services, wanted, self._policy, wish, decision)
                    mover = Mover(Answer(*asked, requests, choices), level, engine, stack)
                    self._account.ranges = mover.ranges
                    events = adapting(events, mover)
                with promised(services, wanted, decision, self._arrived, choices):
                    await self._answer(send, events, choices)

    async def _answer(
        self, send: Send, going: AsyncGenerator[tuple[int, TokenEvent]], choices: list[Choice]
    ) -> None:
        async with aclosing(going) as events:
            if self._wanted.stream:
                await self._stream(send, choices, events)
            else:
                await self._collect(send, choices, events)

    async def _decided(self, decision: Decision) -> float:
        """Act on the decision; returns the seconds its level may take to be ready.

        Raises:
            PressgateError: the decision is to reject.
        """
        assert decision.case is not None, "decided just now"
        self._account.decided(decision, decision.case.snapshot)
        if decision.action != "wait":
            await self._prepare(decision)
        if decision.action == "reject":
            raise refusal(decision)
        remember(self._services, self._wanted, self._policy, decision)
        return self._policy.wait_ms / 1000.0 if decision.action == "wait" else _LOAD_SECONDS

    async def _prepare(self, decision: Decision) -> None:
        """Start what the decision wants in the background; this request does not depend on it."""
        if decision.warm is not None:
            self._services.background(self._services.pool.warm(self._wanted.model, decision.warm))
        if decision.build is None:
            return
        try:
            await self._services.pool.request_build(
                self._wanted.model, decision.build, reason=f"policy {decision.policy}"
            )
        except PressgateError as error:  # queue full, or built meanwhile
            log.info("not building %s: %s", decision.build, error.message)

    def _choices(self) -> list[Choice]:
        n = self._wanted.n
        return [
            Choice(index * n + i, echo=echo)
            for index, echo in enumerate(self._wanted.echoes)
            for i in range(n)
        ]

    def _requests(self) -> list[GenerationRequest]:
        """One per sequence; with a seed, sequence i of a prompt gets seed + i."""
        wanted = self._wanted
        return [
            GenerationRequest(
                id=token_hex(16),
                prompt=prompt,
                sampling=wanted.seeded(i),
                prompt_logprobs=wanted.prompt_logprobs,
                context=self._account.context,
            )
            for prompt in wanted.prompts
            for i in range(wanted.n)
        ]

    async def _collect(
        self, send: Send, choices: list[Choice], events: AsyncIterator[tuple[int, TokenEvent]]
    ) -> None:
        async for index, event in events:
            choices[index].keep(event)
        if self._wanted.muted:
            for choice in choices:
                choice.mute()
        body = self._shape.whole(
            choices,
            {"usage": self._account.usage(), "compression": self._account.compression()},
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self._headers(),
        ]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, send: Send, choices: list[Choice], events: AsyncIterator[tuple[int, TokenEvent]]
    ) -> None:
        """Headers go out with the first event: an engine that fails at once is a clean 503."""
        account, wanted = self._account, self._wanted
        usage = account.usage if wanted.include_usage else None
        stream = Stream(self._shape, choices, muted=wanted.muted, usage=usage)
        async for index, event in events:
            data = stream.feed(index, event, account.compression)
            if not self._started:
                await self._start(send)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await self._send_last(send, stream.end(account.compression))

    async def _start(self, send: Send) -> None:
        self._started = True
        headers = [*_STREAM_HEADERS, *self._headers()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        left = {} if self._taken is None else self._taken.headers
        told = [(name.encode(), value.encode()) for name, value in left.items()]
        return [*self._account.headers(), *told]

    @staticmethod
    async def _send_last(send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": False})


class GenerationResponse(Response):
    """A generation as what a path operation returns."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generation(scope, receive, send)
