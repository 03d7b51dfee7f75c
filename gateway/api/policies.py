"""Policies over HTTP: read, replace, delete, their versions, and candidates tried on a share.

The store persists, validates and tells replicas; here are bodies, parameters and who it was.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from gateway.api.deps import CalledBy, Services, Using
from gateway.api.schemas import body_schema, parse, read_body
from gateway.errors import InvalidRequest, NotFound
from gateway.policy.canary import Plan
from gateway.policy.parse import parse_policy
from gateway.policy.policy import Policy
from gateway.policy.versions import LOCAL, MAX_COMMENT, By, History, Version, changes

router = APIRouter(tags=["Pressgate"])
Shape = TypeVar("Shape", bound=BaseModel)

_Comment = Annotated[
    str | None, Query(max_length=MAX_COMMENT, description="why; kept with the version")
]
_Number = Annotated[int | None, Query(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    comment: Annotated[str, Field(max_length=MAX_COMMENT)] | None = None


class RollbackBody(_Body):
    """`POST /v1/policies/{name}:rollback`; 0 is what the configuration holds."""

    version: Annotated[int, Field(ge=0)]


class CanaryBody(_Body, Plan):
    """`POST /v1/policies/{name}:canary`; without `policy` the candidate being tried goes on with
    another share or other bounds."""

    policy: dict[str, Any] | None = None


class EndBody(_Body):
    """`POST /v1/policies/{name}:promote` and `:abort`."""


async def changed_by(caller: CalledBy, comment: _Comment = None) -> By:
    """Who calls, by the name of the API key, and why."""
    return By(author=caller.key or LOCAL.author, comment=comment)


Author = Annotated[By, Depends(changed_by)]


@router.get("/v1/policies", summary="Every policy, in matching order")
async def policies(services: Using) -> dict[str, Any]:
    """With everything each inherits."""
    data = [policy.model_dump(mode="json") for policy in services.policies.list()]
    return {"object": "list", "data": data}


@router.get("/v1/policies/{name}", summary="One policy")
async def policy(name: str, services: Using) -> dict[str, Any]:
    """With everything it inherits; as it was written: see its versions."""
    return services.policies.get(name).model_dump(mode="json")


@router.put(
    "/v1/policies/{name}", summary="Create or replace a policy", openapi_extra=body_schema(Policy)
)
async def put_policy(name: str, request: Request, services: Using, by: Author) -> dict[str, Any]:
    """Takes effect for the next request here at once, and on other replicas within a moment."""
    given = parse_policy(name, _object(await read_body(request)))
    await services.policies.put(given, by)
    return services.policies.get(name).model_dump(mode="json")


@router.delete("/v1/policies/{name}", status_code=204, summary="Delete a policy")
async def delete_policy(name: str, services: Using, by: Author) -> Response:
    """Its versions stay, and can be rolled back to."""
    await services.policies.delete(name, by)
    return Response(status_code=204)


# -- versions -----------------------------------------------------------------------------------


@router.get("/v1/policies/{name}/versions", summary="Who changed a policy, when and why")
async def versions(name: str, services: Using) -> dict[str, Any]:
    """Newest first; 0 is what the configuration holds."""
    history = services.policies.history(name)
    data = [_row(version, history) for version in reversed(history.versions)]
    return {"object": "list", "data": data}


@router.get("/v1/policies/{name}/versions/{number}", summary="One version of a policy")
async def version(name: str, number: int, services: Using) -> dict[str, Any]:
    """`document` is the policy as it was written; null where it was deleted."""
    history = services.policies.history(name)
    found = history.get(number)
    return {**_row(found, history), "document": found.document}


@router.get("/v1/policies/{name}/diff", summary="What changed between two versions")
async def diff(
    name: str,
    services: Using,
    older: Annotated[int | None, Query(alias="from", ge=0)] = None,
    newer: Annotated[int | None, Query(alias="to", ge=0)] = None,
) -> dict[str, Any]:
    """Without `to` the newest version, without `from` the one before `to`."""
    history = services.policies.history(name)
    after = history.versions[-1] if newer is None else history.get(newer)
    before = _before(history, after) if older is None else history.get(older)
    return {
        "object": "policy_diff",
        "policy": name,
        "from": before.version if before is not None else None,
        "to": after.version,
        "changes": changes(before.document if before is not None else None, after.document),
    }


@router.post(
    "/v1/policies/{name}:rollback",
    summary="Put an earlier version in force again",
    openapi_extra=body_schema(RollbackBody),
)
async def rollback(
    name: str, request: Request, services: Using, caller: CalledBy
) -> dict[str, Any]:
    body = parse(await read_body(request), RollbackBody)
    by = await changed_by(caller, body.comment)
    made = await services.policies.rollback(name, body.version, by)
    return _row(made, services.policies.history(name))


# -- candidates ---------------------------------------------------------------------------------


@router.get("/v1/policies/{name}/canary", summary="The candidate that is being tried")
async def canary(name: str, services: Using) -> dict[str, Any]:
    """Both arms' attainment over all replicas, and bounds on how far the candidate's fell."""
    return _status(services, name)


@router.post(
    "/v1/policies/{name}:canary",
    summary="Try a candidate on a share of a policy's requests",
    openapi_extra=body_schema(CanaryBody),
)
async def start_canary(
    name: str, request: Request, services: Using, caller: CalledBy
) -> dict[str, Any]:
    """It is dropped by itself when it surely attains more than `max_drop` less than the policy in
    force; otherwise it goes on until `:promote` or `:abort`."""
    body = parse(await read_body(request), CanaryBody)
    store = services.policies
    document = body.policy
    if document is None:
        store.get(name)
        trial = store.history(name).trial
        if trial is None:
            raise InvalidRequest(
                "policy: is needed, for no candidate is being tried", param="policy"
            )
        document = trial.document
    try:
        candidate = parse_policy(name, document)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=f"policy.{error.param}") from None
    plan = Plan(**{field: getattr(body, field) for field in Plan.model_fields})
    await store.start_canary(candidate, plan, await changed_by(caller, body.comment))
    return _status(services, name)


@router.post(
    "/v1/policies/{name}:promote",
    summary="Put the candidate in force",
    openapi_extra=body_schema(EndBody),
)
async def promote(name: str, request: Request, services: Using, caller: CalledBy) -> dict[str, Any]:
    by = await changed_by(caller, (await _optional(request)).comment)
    made = await services.policies.promote(name, by)
    return _row(made, services.policies.history(name))


@router.post(
    "/v1/policies/{name}:abort",
    summary="Drop the candidate",
    openapi_extra=body_schema(EndBody),
)
async def abort(name: str, request: Request, services: Using, caller: CalledBy) -> dict[str, Any]:
    by = await changed_by(caller, (await _optional(request)).comment)
    made = await services.policies.abort(name, by)
    return _row(made, services.policies.history(name))


def _status(services: Services, name: str) -> dict[str, Any]:
    store = services.policies
    store.get(name)
    split, trial = store.split(name), store.history(name).trial
    if split is None or trial is None:
        raise NotFound(f"policy {name!r}: no candidate is being tried", code="no_canary")
    return {
        "object": "policy_canary",
        "policy": name,
        "version": trial.version,
        **store.rollouts.status(name, split),
    }


def _row(version: Version, history: History) -> dict[str, Any]:
    in_force = history.in_force
    return {
        "object": "policy_version",
        **version.row(),
        "in_force": in_force is not None and in_force.version == version.version,
    }


def _before(history: History, version: Version) -> Version | None:
    older = [one for one in history.versions if one.version < version.version]
    return older[-1] if older else None


async def _optional(request: Request) -> EndBody:
    """A body that may be left out."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in (
        request.headers
    ):
        return EndBody()
    return parse(await read_body(request), EndBody)


def _object(raw: bytes) -> object:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", param="body") from None
