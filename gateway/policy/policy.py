"""A policy: a named rule set of an operator. Pure data; `policy.store` keeps them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gateway.policy.budget import Budget, Objective, OnMiss
from gateway.policy.hours import Hours

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
_Text = Annotated[str, Field(min_length=1, max_length=256)]
_Key = Annotated[str, Field(min_length=1, max_length=64)]  # OpenAI's bounds on `metadata`
_Value = Annotated[str, Field(max_length=512)]


class Match(BaseModel):
    """Whom a policy applies to. Every given condition must hold; none given matches nobody
    (such a policy is reached by name only, or as `default`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key: Annotated[tuple[_Text, ...], Field(max_length=256)] = ()  # key names, not secrets
    path: _Text | None = None
    model: _Text | None = None
    header: Annotated[dict[_Text, _Text], Field(max_length=16)] = Field(default_factory=dict)
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] = Field(default_factory=dict)
    hours: Hours | None = None


class Policy(Budget):
    """Default and outer budget for the requests it matches, and what to do when it cannot be kept.

    The budget fields inherited from `Budget` are outer bounds: a request may tighten them, never
    loosen them. `levels` (empty: all) are the only levels it may use, best liked first on ties.
    `objective` and `on_miss` are defaults: a request's own replace them, for they say how a level
    is chosen inside the bounds, not what the bounds are. A caller whose API key `match.api_key` of
    any policy lists can name only such policies; every other caller may name any policy that is
    not reserved for keys.

    With `extends`, every field that is not written here is the parent's, and follows it when it
    changes; whom a policy applies to (`match`) is its own. See `policy.inherit`.
    """

    name: Name
    extends: Name | None = None
    match: Match = Match()
    levels: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    objective: Objective = "quality"
    on_miss: OnMiss = "nearest"
    wait_ms: Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)] = 120_000
    build: bool = True  # may a miss start a build?
    expected_requests: Annotated[int, Field(ge=0, le=10**9)] = 100  # traffic a build must pay for
    # Share of answers that must keep a promised time: bounds on times are judged by that quantile.
    confidence: Annotated[float, Field(ge=0.5, le=0.99)] = 0.9
    adaptive: bool = False  # may a running answer change its level?
    priority: Annotated[int, Field(ge=0, le=9)] = 5  # who goes first when there is a queue; 9 does

    @property
    def budget(self) -> Budget:
        return Budget(**{name: getattr(self, name) for name in Budget.model_fields})


DEFAULT = Policy(name="default", max_ppl_ratio=1.02)
# What a gateway without a configuration offers by name, besides `default`.
BUILTIN = (
    DEFAULT,
    Policy(name="interactive", ttft_ms=300, tpot_ms=40, max_ppl_ratio=1.10),
    Policy(name="compact", max_ppl_ratio=1.25, objective="memory", on_miss="wait"),
    Policy(name="fast", max_ppl_ratio=2.0, objective="latency"),
)
