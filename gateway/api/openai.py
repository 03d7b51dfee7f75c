"""OpenAI's endpoints. Thin: read, bound, match a policy, hand over to the walk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request

from gateway.api.auth import Caller
from gateway.api.deps import CalledBy, Services, Using
from gateway.api.generate import GenerationResponse
from gateway.api.match import policy_for
from gateway.api.prepare import prepare, read_sla, split_model
from gateway.api.schemas import ChatBody, CompletionBody, body_schema, parse, read_body
from gateway.errors import NotFound, PressgateError
from gateway.metrics import NONE, Finished

router = APIRouter(tags=["OpenAI"])

_SLO_HEADERS = (
    "`model` may be `MODEL` (the gateway picks the level) or `MODEL@LEVEL`. The budget is the "
    "tighter of `sla` and the headers `x-slo-ttft-ms`, `x-slo-tpot-ms`, `x-slo-latency-ms`; the "
    "policy is `sla.policy`, else the header `x-pressgate-policy`, else the first that matches. "
    "The answer says in `compression` which level served, why, and what was measured."
)


@router.post(
    "/v1/chat/completions",
    summary="Chat",
    description=_SLO_HEADERS,
    openapi_extra=body_schema(ChatBody),
)
async def chat(request: Request, services: Using, caller: CalledBy) -> GenerationResponse:
    with _counting_refusals(services):
        arrived = time.perf_counter()
        body = parse(await read_body(request), ChatBody)
        return await _generation(request, services, caller, body, arrived)


@router.post(
    "/v1/completions",
    summary="Complete a text",
    description=_SLO_HEADERS,
    openapi_extra=body_schema(CompletionBody),
)
async def completions(request: Request, services: Using, caller: CalledBy) -> GenerationResponse:
    with _counting_refusals(services):
        arrived = time.perf_counter()
        body = parse(await read_body(request), CompletionBody)
        return await _generation(request, services, caller, body, arrived)


@contextmanager
def _counting_refusals(services: Services) -> Iterator[None]:
    """Requests that never reach the walk count under no model; the walk counts all others."""
    try:
        yield
    except PressgateError as error:
        services.metrics.request_finished(Finished(NONE, NONE, NONE, error.status))
        raise


async def _generation(
    request: Request,
    services: Services,
    caller: Caller,
    body: ChatBody | CompletionBody,
    arrived: float,
) -> GenerationResponse:
    sla = read_sla(body.sla, request.headers)
    wanted = await prepare(body, services, sla)
    policy = policy_for(request, services, caller, wanted)
    return GenerationResponse(services, wanted, policy, caller.key, arrived)


@router.get("/v1/models", summary="Models and their levels")
async def models(services: Using) -> dict[str, Any]:
    """Each model by itself (the gateway picks the level) and pinned to each of its levels."""
    data = []
    for model in services.pool.models():
        data.append(_card(services, model))
        data += [
            _card(services, f"{model}@{facts.level}")
            for facts in services.pool.snapshot(model).levels
        ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{name:path}", summary="One model")
async def model_card(name: str, services: Using) -> dict[str, Any]:
    model, level = split_model(name)
    snapshot = services.pool.snapshot(model)
    if level is not None and snapshot.level(level) is None:
        raise NotFound(f"{model} has no level {level!r}", param="model", code="level_not_found")
    return _card(services, name)


def _card(services: Services, name: str) -> dict[str, Any]:
    model, _, level = name.partition("@")
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "pressgate",
        "max_model_len": services.pool.context_length(model),
        "root": model,
        "level": level or None,
    }
