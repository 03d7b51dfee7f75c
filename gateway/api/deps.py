"""What the endpoints need, as one frozen bundle. Creates nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from gateway.api.auth import ANYONE, Caller
from gateway.api.ledger import Ledger
from gateway.api.tracing import Traces
from gateway.config import Settings
from gateway.errors import InvalidRequest, PressgateError
from gateway.metrics import Metrics
from gateway.policy.admission import Admission
from gateway.policy.predictor import Predictor
from gateway.policy.quota import Quotas
from gateway.policy.store import PolicyStore
from gateway.quality.shadow import Shadow
from gateway.variants.pool import VariantPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the endpoints use; lives in `app.state.services`."""

    settings: Settings
    pool: VariantPool
    policies: PolicyStore
    predictor: Predictor
    admission: Admission
    metrics: Metrics
    shadow: Shadow | None = None
    quotas: Quotas = field(default_factory=Quotas)
    ledger: Ledger = field(default_factory=Ledger)
    traces: Traces | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the request that wants it; its failure is a log line."""
        task = asyncio.create_task(_quietly(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except PressgateError as error:
        log.info("background work: %s", error.message)


async def services_of(request: Request) -> Services:
    """Async although it waits for nothing: FastAPI runs plain functions in a thread."""
    return cast(Services, request.app.state.services)


async def caller_of(request: Request) -> Caller:
    """Set by `AuthMiddleware`; an app without it is open."""
    return cast(Caller, request.scope.get("caller", ANYONE))


def one_model(pool: VariantPool, named: str | None) -> str:
    """The model meant by a call about levels.

    Raises:
        InvalidRequest: none named although there are several. NotFound: from the pool.
    """
    models = pool.models()
    if named is None and len(models) > 1:
        raise InvalidRequest(f"model: name one of {', '.join(models)}", param="model")
    model = named or models[0]
    pool.tokenizer(model)
    return model


Using = Annotated[Services, Depends(services_of)]
CalledBy = Annotated[Caller, Depends(caller_of)]
