"""SLA mixes: which classes of traffic a run sends, in what shares, and what each must keep.

A mix is a YAML file. Every class has a `weight`, optionally an `sla` object sent with the request
as it is, and `goals` by which the run judges it. Without `goals`, the latency budgets inside `sla`
are the goals, so that one file says once what is asked and what is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

GOALS = ("ttft_ms", "tpot_ms", "latency_ms")

_Kind = TypeVar("_Kind", bound=BaseModel)
_Millis = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Tokens = Annotated[int, Field(ge=1, le=1_000_000)]


class BadInput(Exception):
    """A flag or a file is wrong. The message names the flag; the command exits with 2."""


class Part(BaseModel):
    """Of a file that people write: frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Goals(Part):
    """Latency goals in ms; None means no goal. A request is good when it keeps all of them."""

    ttft_ms: _Millis | None = None
    tpot_ms: _Millis | None = None
    latency_ms: _Millis | None = None


class Lengths(Part):
    """A range of token counts, both ends included; drawn uniformly."""

    low: _Tokens
    high: _Tokens

    @model_validator(mode="before")
    @classmethod
    def _from_number_or_pair(cls, value: Any) -> Any:
        if isinstance(value, int):
            return {"low": value, "high": value}
        if isinstance(value, list) and len(value) == 2:
            return {"low": value[0], "high": value[1]}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Lengths:
        if self.low > self.high:
            raise ValueError("the first number must not be above the second")
        return self


class TrafficClass(Part):
    """One class: its share (`weight`), what it sends and what it must keep.

    `model` replaces the run's model (e.g. `docs-17m@int8`); `prompt_tokens` and `max_tokens` (a
    number or `[low, high]`) replace the run's lengths, also those of a trace.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    sla: dict[str, Any] | None = None
    goals: Goals = Goals()
    model: str | None = None
    prompt_tokens: Lengths | None = None
    max_tokens: Lengths | None = None

    @model_validator(mode="before")
    @classmethod
    def _goals_from_sla(cls, value: Any) -> Any:
        if isinstance(value, dict) and "goals" not in value and isinstance(value.get("sla"), dict):
            return {**value, "goals": {k: v for k, v in value["sla"].items() if k in GOALS}}
        return value


class Mix(Part):
    """The classes of a run."""

    classes: Annotated[tuple[TrafficClass, ...], Field(min_length=1, max_length=64)]

    @field_validator("classes")
    @classmethod
    def _names_once(cls, classes: tuple[TrafficClass, ...]) -> tuple[TrafficClass, ...]:
        names = [item.name for item in classes]
        if len(set(names)) < len(names):
            raise ValueError("a class name is given twice")
        return classes


def load_mix(path: Path) -> Mix:
    """Read a mix file. Raises: BadInput, see `load_file`."""
    return load_file(path, "--mix", Mix)


def load_file(path: Path, flag: str, kind: type[_Kind]) -> _Kind:
    """Read a YAML file that `flag` names.

    Raises:
        BadInput: a missing file, bad YAML, an unknown key or a bad value, each named.
    """
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInput(f"{flag} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {path}: not valid YAML: {error}") from None
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise BadInput(f"{flag} {path}: {'; '.join(faults)}") from None


def single_class(goals: Goals) -> Mix:
    """The mix of a run without a mix file: one class, no `sla`, the goals of the flags."""
    return Mix(classes=(TrafficClass(name="all", goals=goals),))
