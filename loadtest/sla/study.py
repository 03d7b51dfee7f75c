"""A study: the callers with their promises, the levels, the traffic. One YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from loadtest.mix import Goals, Mix, Part, TrafficClass, load_file

TIMES: Final = ("ttft_ms", "tpot_ms", "latency_ms")
_Level = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9@+._-]{0,127}$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Promise(Part):
    """What a class is owed: every given bound has to be kept by an answer for it to count.

    `max_ppl_ratio` and `min_agreement` are those of the level that served (its card's);
    `memory_mb` bounds the level's resident weights with the request's own KV cache.
    """

    ttft_ms: _Positive | None = None
    tpot_ms: _Positive | None = None
    latency_ms: _Positive | None = None
    max_ppl_ratio: Annotated[float, Field(ge=1)] | None = None
    min_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    memory_mb: _Positive | None = None

    def bounds(self) -> dict[str, float]:
        """The bounds that are set."""
        return self.model_dump(exclude_none=True)


class Caller(Part):
    """One class of callers: its share of the traffic, its promise, and the rest of its policy as
    the gateway takes it (objective, on_miss, priority, …)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    weight: _Positive = 1.0
    promise: Promise = Promise()
    policy: dict[str, Any] = Field(default_factory=dict)

    @property
    def traffic(self) -> TrafficClass:
        """As the load generator knows it; the gateway is told the policy's name only."""
        times = {name: getattr(self.promise, name) for name in TIMES}
        return TrafficClass(
            name=self.name, weight=self.weight, sla={"policy": self.name}, goals=Goals(**times)
        )


class Traffic(Part):
    """How a trace is fitted to a small machine.

    A run plays `seconds` of a window that begins at a random moment of the trace; `rate` is the
    mean number of requests per second, reached by scaling time. The first `warm_seconds` are
    played but not counted. Lengths are scaled by `length` and cut at the caps (tokens).
    """

    seconds: _Positive = 40.0
    warm_seconds: Annotated[float, Field(ge=0)] = 8.0
    drain_seconds: _Positive = 20.0
    rate: _Positive = 12.0
    length: _Positive = 0.15
    max_prompt: Annotated[int, Field(ge=1)] = 512
    max_output: Annotated[int, Field(ge=1)] = 96


class Study(Part):
    """What is compared, with what, under which traffic.

    Attributes:
        model: name and path of the served model.
        levels: every level in the ladder; each is also a system of its own, served alone.
        absent: those that are not built when a run begins (the others are).
        memory_budget: of every system.
        settings: more of the server's configuration, the same for every system.
        ablations: by name, what is taken from the gateway: settings and policy fields that
            replace its own.
    """

    model: Annotated[str, Field(min_length=1)] = "docs-17m"
    path: str = "builtin"
    levels: Annotated[tuple[_Level, ...], Field(min_length=2, max_length=16)]
    absent: tuple[_Level, ...] = ()
    memory_budget: str = "128MB"
    settings: dict[str, Any] = Field(default_factory=dict)
    traffic: Traffic = Traffic()
    callers: Annotated[tuple[Caller, ...], Field(min_length=1, max_length=16)]
    ablations: dict[str, dict[Literal["settings", "policy"], dict[str, Any]]] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _known(self) -> Study:
        unknown = set(self.absent) - set(self.levels)
        if unknown:
            raise ValueError(f"absent: not among the levels: {', '.join(sorted(unknown))}")
        return self

    @property
    def mix(self) -> Mix:
        return Mix(classes=tuple(caller.traffic for caller in self.callers))

    def caller(self, name: str) -> Caller:
        return next(caller for caller in self.callers if caller.name == name)


def load_study(path: Path) -> Study:
    """Read a study. Raises: BadInput, see `loadtest.mix.load_file`."""
    return load_file(path, "--study", Study)
