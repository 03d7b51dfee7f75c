"""A policy from outside: validation whose errors name every field at fault. Pure."""

from __future__ import annotations

from typing import Any, Final

import orjson
from pydantic import BaseModel, ValidationError

from gateway.errors import InvalidRequest
from gateway.policy.hours import Hours
from gateway.policy.policy import Match, Policy

MAX_BYTES: Final = 256 * 1024  # of one policy as JSON
_PARTS: Final[dict[tuple[str, ...], type[BaseModel]]] = {
    (): Policy,
    ("match",): Match,
    ("match", "hours"): Hours,
}


def parse_policy(name: str, document: object) -> Policy:
    """
    Raises:
        InvalidRequest: names each field at fault and what is allowed there.
    """
    if not isinstance(document, dict):
        raise InvalidRequest("a policy is an object of fields", param="body")
    if document.get("name", name) != name:
        raise InvalidRequest(f"name: must be {name!r}, as in the path", param="name")
    try:
        policy = Policy.model_validate({**document, "name": name})
    except ValidationError as error:
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InvalidRequest("; ".join(problems(error)), param=first) from None
    if len(orjson.dumps(written(policy))) > MAX_BYTES:
        raise InvalidRequest(f"a policy has at most {MAX_BYTES} bytes", param="body")
    return policy


def written(policy: Policy) -> dict[str, Any]:
    """The fields somebody wrote, without the name: what is stored, compared and inherited."""
    return policy.model_dump(mode="json", exclude_unset=True, exclude={"name"})


def problems(error: ValidationError) -> list[str]:
    """One line per fault of a policy: the field, what is wrong, what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            part = _PARTS.get(tuple(str(step) for step in item["loc"][:-1]), Policy)
            lines.append(f"{where}: unknown; allowed are {', '.join(part.model_fields)}")
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return lines
