"""Recipes: what is done to a model, parsed from and printed as a level name. Torch-free.

A name is one or more steps joined by `+`, applied left to right: structural (`depth-75`), then low
rank or sparsity (`lowrank-80`, `sparse24-wanda`), then quantization (`int8`, `int4-gptq-g128`). The
dense names `fp32`, `bf16`, `fp16` stand alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from compressors.registry import METHODS, Family, Kind, variants

Dtype = Literal["fp32", "bf16", "fp16"]
BITS = (2, 3, 4, 8)
MAX_NAME = 128
_MIN_GROUP, _MAX_GROUP = 8, 4096
_MIN_PERCENT, _MAX_PERCENT = 5, 99
# Order of a stack. A step may only follow one of an earlier stage.
_STAGE: dict[Kind, tuple[int, str]] = {
    "depth": (0, "structural pruning"),
    "lowrank": (1, "low rank or sparsity"),
    "sparse24": (1, "low rank or sparsity"),
    "quantize": (2, "quantization"),
}


class RecipeError(ValueError):
    """The name is no level; the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class Step:
    """One method with its settings. Fields that a kind does not use keep their defaults.

    Attributes:
        method: key of `registry.METHODS`.
        kind: `quantize`, `sparse24`, `lowrank` or `depth`.
        bits: width of a code (`quantize`), else 16.
        group: columns that share a scale; None is one scale per output channel (`quantize`).
        symmetric: zero point fixed at half range (`quantize`).
        percent: of layers (`depth`) or parameters (`lowrank`) kept; 50 for `sparse24`.
    """

    method: str
    kind: Kind
    bits: int = 16
    group: int | None = None
    symmetric: bool = False
    percent: int = 100

    @property
    def name(self) -> str:
        if self.kind == "quantize":
            if (self.method, self.bits, self.group) == ("rtn", 8, None):
                return "int8"
            return f"int{self.bits}-{self.method}-g{self.group or 'ch'}"
        if self.kind == "sparse24":
            return f"sparse24-{self.method}"
        return f"{self.kind}-{self.percent}"

    @property
    def needs_calibration(self) -> bool:
        return METHODS[self.method].needs_calibration

    def group_columns(self, in_features: int) -> int:
        """Columns per group for a layer of that width: never more than it has."""
        return in_features if self.group is None else min(self.group, in_features)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A level's recipe. Equal recipes have equal names.

    Attributes:
        steps: what is done, in order; empty for a dense level.
        dtype: the type a dense level is stored and computed in; None otherwise (tensors that are
            not compressed keep the checkpoint's type).
    """

    steps: tuple[Step, ...]
    dtype: Dtype | None = None

    @property
    def name(self) -> str:
        """Canonical level name; `Recipe.parse(r.name) == r`."""
        return self.dtype or "+".join(step.name for step in self.steps)

    @property
    def family(self) -> Family:
        """The family of the first step, which changes the model most."""
        return METHODS[self.steps[0].method].family if self.steps else "dense"

    @property
    def needs_calibration(self) -> bool:
        return any(step.needs_calibration for step in self.steps)

    def step(self, kind: Kind) -> Step | None:
        """The step of that kind, if the recipe has one."""
        return next((step for step in self.steps if step.kind == kind), None)

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """The recipe a level name stands for.

        Raises:
            RecipeError: not a level name, a setting out of range, or a stack that makes no sense.
        """
        if len(name) > MAX_NAME:
            raise RecipeError(f"level name longer than {MAX_NAME} characters")
        text = name.strip().lower()
        if text in get_args(Dtype):
            return cls((), next(d for d in get_args(Dtype) if d == text))
        steps = tuple(_parse_step(part, name) for part in text.split("+"))
        _check_stack(steps, name)
        return cls(steps)


def grammar() -> str:
    """One line that lists every kind of level name; used in error messages and help."""
    bits = ",".join(map(str, BITS))
    quantizers = "|".join(variants("quantize"))
    pruners = "|".join(variants("sparse24"))
    return (
        f"{', '.join(get_args(Dtype))}; int8; int<{bits}>-<{quantizers}>-g<group or ch>; "
        f"sparse24-<{pruners}>; depth-<percent of layers kept>; "
        "lowrank-<percent of parameters kept>; stacks joined by '+'"
    )


def _parse_step(part: str, name: str) -> Step:
    if part == "int8":
        return Step("rtn", "quantize", bits=8, symmetric=True)
    if match := re.fullmatch(r"int(\d+)-([a-z0-9]+)-g(\d+|ch)", part):
        return _quantize(part, int(match[1]), match[2], match[3])
    if match := re.fullmatch(r"sparse24-([a-z0-9]+)", part):
        _check_method(part, match[1], "sparse24")
        return Step(match[1], "sparse24", percent=50)
    if match := re.fullmatch(r"(depth|lowrank)-(\d+)", part):
        percent = int(match[2])
        if not _MIN_PERCENT <= percent <= _MAX_PERCENT:
            raise RecipeError(f"{part!r}: percent must be {_MIN_PERCENT} to {_MAX_PERCENT}")
        if match[1] == "depth":
            return Step("depth", "depth", percent=percent)
        return Step("svd", "lowrank", percent=percent)
    if part in get_args(Dtype):
        raise RecipeError(f"{name!r}: {part} is a dense level and cannot be part of a stack")
    raise RecipeError(f"unknown level {name!r}: {part!r} is not a step; known: {grammar()}")


def _quantize(part: str, bits: int, method: str, group: str) -> Step:
    _check_method(part, method, "quantize")
    if bits not in BITS:
        raise RecipeError(f"{part!r}: bits must be one of {', '.join(map(str, BITS))}")
    columns = None if group == "ch" else int(group)
    if columns is not None and not (
        _MIN_GROUP <= columns <= _MAX_GROUP and columns % _MIN_GROUP == 0
    ):
        raise RecipeError(
            f"{part!r}: group must be a multiple of {_MIN_GROUP} from {_MIN_GROUP} to "
            f"{_MAX_GROUP}, or 'ch' for per channel"
        )
    symmetric = bits >= METHODS[method].symmetric_from
    return Step(method, "quantize", bits=bits, group=columns, symmetric=symmetric)


def _check_method(part: str, method: str, kind: Kind) -> None:
    if method not in variants(kind):
        raise RecipeError(
            f"{part!r}: unknown method {method!r}; known here: {', '.join(variants(kind))}"
        )


def _check_stack(steps: tuple[Step, ...], name: str) -> None:
    alone = next((step for step in steps if METHODS[step.method].whole_model), None)
    if alone is not None and len(steps) > 1:
        raise RecipeError(
            f"{name!r}: {alone.name} does a whole model and cannot be part of a stack"
        )
    for first, second in pairwise(steps):
        (stage, what), (next_stage, next_what) = _STAGE[first.kind], _STAGE[second.kind]
        if stage == next_stage:
            raise RecipeError(
                f"{name!r}: {first.name} and {second.name} are both {what}; a stack has one of each"
            )
        if stage > next_stage:
            raise RecipeError(
                f"{name!r}: {next_what} ({second.name}) must come before {what} ({first.name}), "
                f"which it would undo; write {second.name}+{first.name}"
            )
