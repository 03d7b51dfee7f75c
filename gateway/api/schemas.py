"""The shapes of request bodies, with every static bound. Pure data; limits of the settings are
checked where settings are at hand (`gateway.api.prepare`).

Unknown fields are an error that names them. OpenAI fields that change nothing here are accepted and
ignored; those whose loss would surprise (tools, audio, `suffix`, …) are refused unless empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from starlette.requests import Request
from starlette.types import Receive

from gateway.api.problems import validate_error
from gateway.errors import InvalidRequest
from gateway.policy.budget import Sla

MAX_PROMPTS = 128
MAX_TOKENS = 10_000_000
_MAX_STOP_CHARS = 256

_HARMLESS = frozenset(
    {
        "function_call",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "tool_choice",
        "user",
        "verbosity",
    }
)
_REFUSED = frozenset({"audio", "functions", "suffix", "tools", "web_search_options"})

Prompt = str | tuple[int, ...]
Body = TypeVar("Body", bound=BaseModel)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """A string, strings, token ids or lists of them as one tuple of prompts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a string, a list of strings, token ids or a list of token id lists"
        )
    prompts = [value] if all(type(item) is int for item in value) else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request, not {len(prompts)}")
    return tuple(_prompt(item) for item in prompts)


def _prompt(item: object) -> Prompt:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and item and all(type(i) is int and 0 <= i < 2**31 for i in item):
        return tuple(item)
    raise ValueError(
        "each prompt must be a string or a non-empty list of token ids (integers >= 0)"
    )


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError("must be a string or a list of strings")
    if not all(0 < len(stop) <= _MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"each stop string must have 1 to {_MAX_STOP_CHARS} characters")
    return tuple(stops)


def _content(value: object) -> str:
    """A turn's text: a string, or text parts put together."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError('each part must be {"type": "text", "text": "…"}: text only')
        texts.append(part["text"])
    return "".join(texts)


def _bias(value: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise ValueError("keys must be token ids") from None


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        },
    ]
}
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        {"type": "null"},
    ]
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}
_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_MetaKey = Annotated[str, Field(max_length=64)]  # bounds of OpenAI's own API
_MetaValue = Annotated[str, Field(max_length=512)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class JsonSchema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    """`json_schema` is needed when `type` is `json_schema`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class Generate(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(frozen=True, extra="allow")
    endpoint: ClassVar[str] = ""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Any, AfterValidator(_stops), WithJsonSchema(_STOP_SCHEMA)] = ()
    logit_bias: (
        Annotated[dict[str, _Bias], Field(max_length=1024), AfterValidator(_bias)] | None
    ) = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    metadata: Annotated[dict[_MetaKey, _MetaValue], Field(max_length=16)] | None = None
    sla: Sla | None = None

    @model_validator(mode="after")
    def _known(self) -> Generate:
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or (name in _REFUSED and not value):
                continue
            if name in _REFUSED:
                raise InvalidRequest(
                    f"{name}: not supported by this gateway", param=name, code="unsupported_field"
                )
            raise InvalidRequest(
                f"{name[:64]}: unknown field", param=name[:64], code="unknown_field"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options: allowed only with stream=true", param="stream_options"
            )
        return self


class Message(BaseModel):
    """One turn; `content` becomes plain text. `name` and empty tool fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, AfterValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = ""
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class ChatBody(Generate):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _tops(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs=true", param="top_logprobs")
        return self


class CompletionBody(Generate):
    """`POST /v1/completions`. `max_tokens=0` is allowed with `echo` (scoring a prompt)."""

    prompt: Annotated[Any, AfterValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest("best_of: must equal n when given", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens: 0 is allowed only with echo=true", param="max_tokens")
        return self


async def read_body(request: Request) -> bytes:
    """The raw JSON body; see `read`."""
    return await read(request.headers, request.receive)


async def read(headers: Mapping[str, str], receive: Receive) -> bytes:
    """The raw JSON body.

    Raises:
        InvalidRequest: not declared as JSON, empty, or the caller left. BodyTooLarge: from the
            limit middleware.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        raise InvalidRequest(
            f"content-type must be application/json, not {kind[:64] or 'missing'}",
            param="content-type",
        )
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the caller left while sending the body", param="body")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    raw = b"".join(parts)
    if not raw or raw.isspace():
        raise InvalidRequest("the body is empty; a JSON object is needed", param="body")
    return raw


def parse(raw: bytes, shape: type[Body]) -> Body:
    """Validate strictly: no number from a string, no integer from a bool.

    Raises:
        InvalidRequest: naming every field at fault and what is allowed.
    """
    try:
        return shape.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise validate_error(error) from None


def body_schema(shape: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI piece of an endpoint that reads its body itself."""
    schema = shape.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its references replaced: a request body's own `$defs` would dangle."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}
