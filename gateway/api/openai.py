"""OpenAI's endpoints. Thin: `front` begins a generation, `generate` serves it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.api.deps import Services, Using
from gateway.api.front import CHAT, COMPLETIONS, begin
from gateway.api.generate import GenerationResponse
from gateway.api.prepare import split_model
from gateway.api.schemas import ChatBody, CompletionBody, body_schema
from gateway.errors import NotFound

router = APIRouter(tags=["OpenAI"])

_SLO_HEADERS = (
    "`model` may be `MODEL` (the gateway picks the level) or `MODEL@LEVEL`. The budget is the "
    "tighter of `sla` and the headers `x-slo-ttft-ms`, `x-slo-tpot-ms`, `x-slo-latency-ms`; the "
    "policy is `sla.policy`, else the header `x-pressgate-policy`, else the first that matches. "
    "The answer says in `compression` which level served, why, and what was measured."
)


@router.post(
    CHAT,
    summary="Chat",
    description=_SLO_HEADERS,
    openapi_extra=body_schema(ChatBody),
)
async def chat(request: Request, services: Using) -> GenerationResponse:
    return GenerationResponse(await begin(services, ChatBody, request.scope, request.receive))


@router.post(
    COMPLETIONS,
    summary="Complete a text",
    description=_SLO_HEADERS,
    openapi_extra=body_schema(CompletionBody),
)
async def completions(request: Request, services: Using) -> GenerationResponse:
    return GenerationResponse(await begin(services, CompletionBody, request.scope, request.receive))


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
