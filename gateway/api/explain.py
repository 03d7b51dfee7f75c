"""`POST /v1/explain`: what would happen to a request, level by level. Starts nothing."""

from __future__ import annotations

import asyncio

import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.deps import CalledBy, Using
from gateway.api.front import CHAT, COMPLETIONS
from gateway.api.match import policy_for
from gateway.api.prepare import above_floors, prepare, read_sla
from gateway.api.schemas import ChatBody, CompletionBody, body_schema, parse, read_body
from gateway.api.turn import ask_of, make_decision
from gateway.config import Floors
from gateway.errors import InvalidRequest
from gateway.policy.explain import explanation

router = APIRouter(tags=["Pressgate"])


@router.post(
    "/v1/explain",
    summary="Explain a decision",
    description="Takes the body of a chat or a plain completion and generates nothing.",
    openapi_extra=body_schema(CompletionBody),
)
async def explain(request: Request, services: Using, caller: CalledBy) -> Response:
    raw = await read_body(request)
    body = parse(raw, ChatBody) if _is_chat(raw) else parse(raw, CompletionBody)
    wanted = await prepare(
        body, services, above_floors(read_sla(body.sla, request.headers), caller.floors)
    )
    path = CHAT if wanted.chat else COMPLETIONS  # policies match the endpoint explained
    policy = policy_for(path, request.headers, services, caller, wanted)
    ask = ask_of(wanted)
    decision, snapshot = make_decision(services, ask, policy)
    floors = floors_of(caller.floors)
    told = await asyncio.to_thread(explanation, ask, policy, decision, snapshot, floors)
    # A ruined level's ratio is infinite, which JSON has no word for; orjson says null.
    return Response(orjson.dumps(told), media_type="application/json")


def floors_of(floors: Floors) -> dict[str, float]:
    """By bound, in ms; where there is none, a caller may ask for anything."""
    return floors.model_dump(exclude_none=True, exclude={"tighter"})


def _is_chat(raw: bytes) -> bool:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", param="body") from None
    return isinstance(body, dict) and "messages" in body
