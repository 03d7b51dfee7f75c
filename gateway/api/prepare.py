"""From a validated body to what is to be generated: settings' limits, tokens, sampling, budget.

Decides nothing about levels. Long texts are tokenised off the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import orjson
from pydantic import ValidationError

from gateway.api.deps import Services
from gateway.api.problems import invalid
from gateway.api.schemas import ChatBody, CompletionBody, Generate, Prompt
from gateway.api.wanted import Wanted
from gateway.config import Floors, Limits
from gateway.engine.base import SamplingParams, TextCodec
from gateway.errors import Forbidden, InvalidRequest
from gateway.policy.budget import Budget, Sla

# Characters (or token ids) of all prompts together; less is tokenised in about the time that a
# thread switch costs.
_LONG_TEXT = 4096
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_HEADERS = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tpot-ms": "tpot_ms",
    "x-slo-latency-ms": "latency_ms",
}
POLICY_HEADER = "x-pressgate-policy"


async def prepare(body: ChatBody | CompletionBody, services: Services, sla: Sla) -> Wanted:
    """
    Raises:
        NotFound: unknown model. InvalidRequest: a field is out of bounds, or the prompt too long.
    """
    model, pinned = split_model(body.model)
    tokenizer = services.pool.tokenizer(model)
    limits = services.settings.limits
    _check_limits(body, limits)
    chat = isinstance(body, ChatBody)
    prompts = await _tokenise(body, tokenizer)
    room = _room(prompts, services.pool.context_length(model), "messages" if chat else "prompt")
    asked = _asked_tokens(body)
    default = room if chat else min(room, _COMPLETION_TOKENS)
    max_tokens = default if asked is None else asked
    if max_tokens > room:
        longest = max(len(prompt) for prompt in prompts)
        raise InvalidRequest(
            f"max_tokens: the context holds {longest + room} tokens, the prompt takes {longest}, "
            f"so at most {room} can be generated, not {max_tokens}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    echoes = _echoes(body, prompts, tokenizer)
    sampling = _sampling(body, max(1, max_tokens), tokenizer)
    return Wanted(
        name=body.model,
        model=model,
        pinned=pinned,
        chat=chat,
        prompts=prompts,
        echoes=echoes or ("",) * len(prompts),
        n=body.n,
        sampling=sampling,
        prompt_logprobs=bool(echoes) and sampling.logprobs is not None,
        muted=max_tokens == 0,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        sla=sla,
        metadata=body.metadata or {},
        user=_user(body),
    )


def read_sla(body: Sla | None, headers: Mapping[str, str]) -> Sla:
    """The request's budget from body and headers: the tighter bound wins; the body names the policy
    first, then `x-pressgate-policy`.

    Raises:
        InvalidRequest: a header is not a number in range, naming the header.
    """
    given = {field: headers[name] for name, field in _HEADERS.items() if name in headers}
    policy = headers.get(POLICY_HEADER)
    if not given and policy is None:
        return body or Sla()
    try:
        outer = Budget.model_validate(given)
        named = Sla(policy=policy)
    except ValidationError as error:
        names = {field: header for header, field in _HEADERS.items()} | {"policy": POLICY_HEADER}
        errors = error.errors(include_url=False, include_context=False)
        raise invalid([item | {"loc": (names[str(item["loc"][0])],)} for item in errors]) from None
    body = body or Sla()
    tight = Budget(**{name: getattr(body, name) for name in Budget.model_fields}).intersect(outer)
    return Sla(
        **tight.model_dump(),
        policy=body.policy or named.policy,
        objective=body.objective,
        on_miss=body.on_miss,
    )


def above_floors(sla: Sla, floors: Floors) -> Sla:
    """`sla` as far as the caller's key may ask for it.

    Raises:
        Forbidden: a time is tighter than the key's floor, naming both.
    """
    raised: dict[str, float] = {}
    for name in _HEADERS.values():
        asked, floor = getattr(sla, name), getattr(floors, name)
        if asked is None or floor is None or asked >= floor:
            continue
        if floors.tighter == "refuse":
            raise Forbidden(
                f"sla.{name}: this API key may ask for {floor:g} ms or more, not {asked:g}",
                param=f"sla.{name}",
                code="budget_too_tight",
            )
        raised[name] = floor
    return sla.model_copy(update=raised) if raised else sla


def split_model(name: str) -> tuple[str, str | None]:
    """`docs-17m@int8` → (`docs-17m`, `int8`).

    Raises:
        InvalidRequest: nothing before or after the `@`.
    """
    model, at, level = name.partition("@")
    if not model or (at and not level):
        raise InvalidRequest("model: must be MODEL or MODEL@LEVEL", param="model")
    return model, level or None


def _check_limits(body: ChatBody | CompletionBody, limits: Limits) -> None:
    """The bounds an operator sets."""
    tops = body.top_logprobs if isinstance(body, ChatBody) else body.logprobs
    tops_name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    prompts = len(body.prompt) if isinstance(body, CompletionBody) else 1
    for name, value, most in (
        ("n", body.n, limits.max_n),
        ("stop", len(body.stop), limits.max_stop),
        (tops_name, tops or 0, limits.max_logprobs),
        ("prompt", prompts * body.n, limits.max_concurrent),
    ):
        if value > most:
            what = "entries at most" if name in ("stop", "prompt") else "at most"
            raise InvalidRequest(f"{name}: {what} {most}, not {value}", param=name)


async def _tokenise(
    body: ChatBody | CompletionBody, tokenizer: TextCodec
) -> tuple[tuple[int, ...], ...]:
    if isinstance(body, ChatBody):
        turns = [{"role": _role(m.role), "content": m.content} for m in body.messages]
        size = sum(len(turn["content"]) for turn in turns)
        ids = tokenizer.chat(turns) if size < _LONG_TEXT else await _off(tokenizer.chat, turns)
        return (_checked(ids, tokenizer, "messages"),)
    size = sum(len(prompt) for prompt in body.prompt)
    if size < _LONG_TEXT:
        return _encoded(body.prompt, tokenizer)
    return await _off(_encoded, body.prompt, tokenizer)


_off = asyncio.to_thread


def _encoded(prompts: Sequence[Prompt], tokenizer: TextCodec) -> tuple[tuple[int, ...], ...]:
    return tuple(
        _checked(
            prompt if isinstance(prompt, tuple) else tokenizer.encode(prompt), tokenizer, "prompt"
        )
        for prompt in prompts
    )


def _checked(ids: list[int] | tuple[int, ...], tokenizer: TextCodec, field: str) -> tuple[int, ...]:
    """A foreign id would index past the embedding and take the engine down with it."""
    if not ids:
        raise InvalidRequest(f"{field}: is empty; at least one token is needed", param=field)
    if (worst := max(ids)) >= tokenizer.vocab_size:
        raise InvalidRequest(
            f"{field}: token id {worst} is outside the vocabulary of {tokenizer.vocab_size}",
            param=field,
        )
    return tuple(ids)


def _role(role: str) -> str:
    """Chat templates know `system`; OpenAI's newer models call the same thing `developer`."""
    return "system" if role == "developer" else role


def _room(prompts: tuple[tuple[int, ...], ...], context: int, field: str) -> int:
    """Tokens that can follow the longest prompt, at least one."""
    longest = max(len(prompt) for prompt in prompts)
    if longest >= context:
        raise InvalidRequest(
            f"{field}: {longest} tokens; this model's context holds {context}, "
            f"at least one of them for the answer",
            param=field,
            code="context_length_exceeded",
        )
    return context - longest


def _asked_tokens(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        return body.max_completion_tokens
    return body.max_tokens


def _echoes(
    body: Generate, prompts: tuple[tuple[int, ...], ...], tokenizer: TextCodec
) -> tuple[str, ...]:
    """The prompts as texts to repeat; none unless asked for."""
    if not isinstance(body, CompletionBody) or not body.echo:
        return ()
    return tuple(
        given if isinstance(given, str) else tokenizer.decode(list(ids))
        for given, ids in zip(body.prompt, prompts, strict=True)
    )


def _sampling(body: Generate, max_tokens: int, tokenizer: TextCodec) -> SamplingParams:
    bias = body.logit_bias or {}
    for token in bias:
        if not 0 <= int(token) < tokenizer.vocab_size:
            raise InvalidRequest(
                f"logit_bias: {token} is outside the vocabulary of {tokenizer.vocab_size}",
                param="logit_bias",
            )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=None if body.seed is None else body.seed % 2**63,
        stop=body.stop,
        logprobs=_logprobs(body),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias={int(token): value for token, value in bias.items()},
        json_schema=_schema(body),
        ignore_eos=body.ignore_eos,
    )


def _user(body: Generate) -> str | None:
    """OpenAI's `user`, or what follows it; neither changes an answer."""
    given = body.model_extra or {}
    named = (given.get(name) for name in ("user", "safety_identifier"))
    return next((value for value in named if isinstance(value, str)), None)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logprobs(body: Generate) -> int | None:
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionBody)
    return body.logprobs


def _schema(body: Generate) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return "{}"
    return orjson.dumps(wanted.json_schema.schema_).decode()
