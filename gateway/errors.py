"""The gateway's one error tree and its one rendering, OpenAI's error body.

Handlers raise; `gateway.api` renders. Every class carries its HTTP status and OpenAI `type`;
nothing else in the project turns an error into a response.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

DECISION_HEADER: Final = "x-pressgate-decision"


class PressgateError(Exception):
    """An error a caller can act on.

    Attributes:
        param: the request field (or config key) at fault, if one is.
        retry_after: seconds after which the same call may succeed; sent as `Retry-After`.
        extra: facts added to the error body (e.g. `could_meet`); `decision_id` is a header too.
        more_headers: response headers besides (e.g. what is left of a quota).
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after = retry_after
        self.extra = extra or {}
        self.more_headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """The OpenAI error object, ready for JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.error_code,
                **self.extra,
            }
        }

    def headers(self) -> dict[str, str]:
        """Response headers that go with the error."""
        found = dict(self.more_headers)
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, round(self.retry_after)))
        if "decision_id" in self.extra:
            found[DECISION_HEADER] = self.extra["decision_id"]
        return found


class InvalidRequest(PressgateError):
    """The request (or a file or flag it names) is wrong; the message names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(PressgateError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(PressgateError):
    status = 403
    type = "permission_error"
    code = "insufficient_scope"


class NotFound(PressgateError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(PressgateError):
    """The state of the thing named does not allow this now (e.g. evicting a level in use)."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(PressgateError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class BudgetUnmet(PressgateError):
    """No level keeps the request's budget and its policy says to reject."""

    status = 422
    type = "budget_error"
    code = "budget_unmet"


class Overloaded(PressgateError):
    """Queues are full or the caller's quota is spent; retry later."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class Unavailable(PressgateError):
    """What the request needs is not there yet (level building, engine restarting, no memory)."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"


class ConfigError(PressgateError):
    """The configuration is wrong; the CLI prints it and exits with 2."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_config"


class ModelError(PressgateError):
    """A checkpoint cannot be served (pickle only, broken safetensors, unknown architecture)."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_model"
