"""`GET /v1/decisions/{id}`: why a request got its level, what else it could have got, and whether
the promises were kept.
"""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Response

from gateway.api.deps import CalledBy, Using
from gateway.errors import NotFound

router = APIRouter(tags=["Pressgate"])


@router.get("/v1/decisions/{name}", summary="One decision, explained afterwards")
async def decision(name: str, services: Using, caller: CalledBy) -> Response:
    """The id is `compression.decision_id` of an answer, `error.decision_id` of a refusal, and the
    header `x-pressgate-decision` of both. Kept for a day. A key sees its own decisions, one with
    the scope `admin` everybody's."""
    own = None if "admin" in caller.scopes else caller.key or ""
    told = await services.ledger.read(name, own)
    if told is None:
        raise NotFound(
            "no such decision: it is unknown, older than is kept, or another key's",
            param="id",
            code="decision_not_found",
        )
    # A ruined level's ratio is infinite, which JSON has no word for; orjson says null.
    return Response(orjson.dumps(told), media_type="application/json")
