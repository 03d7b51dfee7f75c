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

from gateway.engine.base import (
    BadPrompt,
    BadSchema,
    EngineError,
    EngineOverloaded,
    SequenceFailed,
)
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


class InternalError(PressgateError):
    """A bug of ours. Whoever turns an exception into this one logs it; the caller learns nothing.

    One per failure: an exception that is raised twice grows its traceback and keeps its frames.
    """

    def __init__(self) -> None:
        super().__init__("internal error; the gateway's log has the details")


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error, its own and the framework's, in OpenAI's shape."""
    app.add_exception_handler(PressgateError, _pressgate)
    app.add_exception_handler(EngineError, _engine)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def as_pressgate(error: BaseException, *, prompt: str = "prompt") -> PressgateError:
    """What a caller may know about any exception; `prompt` is what the endpoint calls its prompt.

    Logs nothing: see `InternalError`.
    """
    match error:
        case PressgateError():
            return error
        case EngineError():
            return _of_engine(error, prompt)
        case TimeoutError():
            return Unavailable("the request ran over its time", code="timeout", retry_after=1.0)
        case _:
            return InternalError()


def _of_engine(error: EngineError, prompt: str) -> PressgateError:
    match error:
        case BadSchema():
            return InvalidRequest(str(error), param="response_format")
        case BadPrompt():
            param = prompt if error.param == "prompt" else error.param
            return InvalidRequest(f"{param}: {error}", param=param)
        case EngineOverloaded():
            return Overloaded(str(error), retry_after=1.0)
        case SequenceFailed():
            return Unavailable(
                "this generation was lost; the request may be sent again",
                code="sequence_failed",
                retry_after=1.0,
            )
        case _:
            return Unavailable(
                "the engine failed; the request may be sent again",
                code="engine_failed",
                retry_after=1.0,
            )


def invalid(errors: Sequence[Any], prefix: str = "") -> InvalidRequest:
    """Pydantic's error list as one error that names each field at fault and what is allowed."""
    fields = [_field(item, prefix) for item in errors[:5]]
    parts = [
        f"{field}: {_reason(item)}" if field else _reason(item)
        for field, item in zip(fields, errors, strict=False)
    ]
    first = (fields[0] or "body") if fields else None
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


def _field(item: Any, prefix: str) -> str:
    """Where an item of pydantic's error list is; empty for the body as a whole."""
    if item["type"] == "json_invalid":  # its place is an offset into text, no field
        return ""
    return prefix + ".".join(str(p) for p in item["loc"] if p not in ("body", "query", "path"))


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
    return render(InternalError())
