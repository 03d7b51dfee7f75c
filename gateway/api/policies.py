"""Policies over HTTP: read, replace, delete. The store persists them and tells replicas."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.deps import Using
from gateway.api.schemas import body_schema, read_body
from gateway.errors import InvalidRequest
from gateway.policy.parse import parse_policy
from gateway.policy.policy import Policy

router = APIRouter(tags=["Pressgate"])


@router.get("/v1/policies", summary="Every policy, in matching order")
async def policies(services: Using) -> dict[str, Any]:
    data = [policy.model_dump(mode="json") for policy in services.policies.list()]
    return {"object": "list", "data": data}


@router.get("/v1/policies/{name}", summary="One policy")
async def policy(name: str, services: Using) -> dict[str, Any]:
    return services.policies.get(name).model_dump(mode="json")


@router.put(
    "/v1/policies/{name}", summary="Create or replace a policy", openapi_extra=body_schema(Policy)
)
async def put_policy(name: str, request: Request, services: Using) -> dict[str, Any]:
    """Takes effect for the next request here at once, and on other replicas within a moment."""
    given = parse_policy(name, _object(await read_body(request)))
    await services.policies.put(given)
    return given.model_dump(mode="json")


@router.delete("/v1/policies/{name}", status_code=204, summary="Delete a policy")
async def delete_policy(name: str, services: Using) -> Response:
    await services.policies.delete(name)
    return Response(status_code=204)


def _object(raw: bytes) -> object:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", param="body") from None
