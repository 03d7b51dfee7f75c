"""Recipes: what is done to a model, parsed from and printed as a level name. Torch-free.

A name is one or more steps joined by `+`, applied left to right, in the order of `stack`: what
removes parts of the model (`depth-75`, `width-75`), low rank or sparsity, quantization, a low-rank
correction of it; then embeddings and the KV cache. A distillation step heals what stands before it.
The dense names `fp32`, `bf16`, `fp16` stand alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

from compressors.grammar import BITS, Dtype, grammar, parse_step
from compressors.registry import METHODS, Family, Kind
from compressors.stack import RecipeError, check_stack
from compressors.step import Step

__all__ = ["BITS", "Dtype", "Recipe", "RecipeError", "Step", "expand", "grammar"]

MAX_NAME = 128


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
        """Distillation if the model was trained, else the family of the first step, which changes
        it most."""
        if not self.steps:
            return "dense"
        trained = self.step("distill")
        return METHODS[(trained or self.steps[0]).method].family

    @property
    def needs_calibration(self) -> bool:
        return any(step.needs_calibration for step in self.steps)

    @property
    def parent(self) -> Recipe:
        """The recipe that is built: of a level that computes with a part of nested codes the one
        that makes them all; else itself."""
        return replace(self, steps=tuple(replace(step, child=0) for step in self.steps))

    @property
    def child(self) -> int:
        """The bits of nested codes that are computed with; 0 where it is all of them."""
        return next((step.child for step in self.steps if 0 < step.child < step.bits), 0)

    @property
    def offers(self) -> tuple[Recipe, ...]:
        """The levels it stands for: a nested recipe that names no child offers both."""
        if not any(step.base and not step.child for step in self.steps):
            return (self,)
        return tuple(
            replace(self, steps=tuple(replace(s, child=bits) if s.base else s for s in self.steps))
            for bits in (8, 4)
        )

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
        steps = tuple(parse_step(part, name) for part in text.split("+"))
        check_stack(steps, name)
        return cls(steps)


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """The names of all levels that the level names `names` stand for, in order, each once.

    Raises:
        RecipeError: one is no level name.
    """
    return tuple(dict.fromkeys(level.name for name in names for level in Recipe.parse(name).offers))
