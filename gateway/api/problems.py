"""Renders every error as OpenAI's error body. Callers never see internals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Send

from gateway.engine.base import BadSchema, EngineError, EngineOverloaded
from gateway.errors import (
    InvalidRequest,
    NotFound,
    Overloaded,
    PressgateError,
    Unavailable,
)

log = logging.getLogger(__name__)

_JSON = "application/json"
_MAX_SHOWN = 80


class MethodNotAllowed(PressgateError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class _Other(PressgateError):
    type = "invalid_request_error"
    code = "http_error"


INTERNAL = PressgateError("internal error; the gateway's log has the details")


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error, its own and the framework's, in OpenAI's shape."""
    app.add_exception_handler(PressgateError, _pressgate)
    app.add_exception_handler(EngineError, _engine)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def as_pressgate(error: BaseException) -> PressgateError:
    """What a caller may know about any exception."""
    match error:
        case PressgateError():
            return error
        case BadSchema():
            return InvalidRequest(str(error), param="response_format")
        case EngineOverloaded():
            return Overloaded(str(error), retry_after=1.0)
        case EngineError():
            return Unavailable(
                "the engine failed; the request may be sent again",
                code="engine_failed",
                retry_after=1.0,
            )
        case TimeoutError():
            return Unavailable("the request ran over its time", code="timeout", retry_after=1.0)
        case _:
            return INTERNAL


def invalid(errors: Sequence[Any], prefix: str = "") -> InvalidRequest:
    """Pydantic's error list as one error that names each field at fault and what is allowed."""
    parts = []
    for item in errors[:5]:
        field = ".".join(str(p) for p in item["loc"] if p not in ("body", "query", "path"))
        field = prefix + field
        parts.append(f"{field}: {_reason(item)}" if field else _reason(item))
    first = parts[0].split(":", 1)[0] if parts and ": " in parts[0] else None
    code = "unknown_field" if errors and errors[0]["type"] == "extra_forbidden" else None
    return InvalidRequest("; ".join(parts), param=first, code=code)


def validate_error(error: ValidationError) -> InvalidRequest:
    return invalid(error.errors(include_url=False, include_context=False))


async def send_error(send: Send, error: PressgateError) -> None:
    """Answer with `error` from a bare ASGI middleware."""
    body = orjson.dumps(error.body())
    headers = [(b"content-type", _JSON.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(k.encode(), v.encode()) for k, v in error.headers().items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def render(error: PressgateError, status: int | None = None) -> Response:
    return Response(
        orjson.dumps(error.body()),
        status_code=status or error.status,
        headers=error.headers(),
        media_type=_JSON,
    )


def _reason(item: Any) -> str:
    if item["type"] == "json_invalid":
        return "the body is not valid JSON" + str(item["msg"]).removeprefix("Invalid JSON")
    if item["type"] == "extra_forbidden":
        return "unknown field"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    if isinstance(given, str | int | float | bool) and item["type"] != "value_error":
        shown = repr(given)
        return f"{message}, not {shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '…'}"
    return message


async def _pressgate(_: Request, error: Exception) -> Response:
    assert isinstance(error, PressgateError)
    return render(error)


async def _engine(_: Request, error: Exception) -> Response:
    return render(as_pressgate(error))


async def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return render(invalid(error.errors()))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:_MAX_SHOWN]
    known: PressgateError
    if error.status_code == 404:
        known = NotFound(f"no such path: {path}")
    elif error.status_code == 405:
        known = MethodNotAllowed(f"{request.method} is not allowed on {path}")
    else:
        known = _Other(str(error.detail))
    response = render(known, error.status_code)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return render(INTERNAL)
