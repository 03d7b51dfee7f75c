"""Which steps may stand together, and in what order. Torch-free."""

from __future__ import annotations

from itertools import pairwise

from compressors.registry import METHODS, Kind, Method
from compressors.step import Step

# Order of a stack. A step may only follow one of an earlier stage; distillation has its own rule.
_STAGE: dict[Kind, tuple[int, str]] = {
    "depth": (0, "depth pruning"),
    "width": (1, "width pruning"),
    "lowrank": (2, "low rank or sparsity"),
    "sparse": (2, "low rank or sparsity"),
    "quantize": (3, "quantization"),
    "correct": (4, "low-rank correction"),
    "embed": (5, "embedding quantization"),
    "kv": (6, "KV-cache quantization"),
}
# Forms that every quantizer finds as a plain weight: these kinds only remove or train weights.
_PLAIN: frozenset[Kind] = frozenset({"depth", "width", "distill"})


class RecipeError(ValueError):
    """The name is no level; the message says what is allowed."""


def check_stack(steps: tuple[Step, ...], name: str) -> None:
    alone = next((step for step in steps if METHODS[step.method].whole_model), None)
    if alone is not None and len(steps) > 1:
        raise RecipeError(
            f"{name!r}: {alone.name} does a whole model and cannot be part of a stack"
        )
    _check_order(tuple(step for step in steps if step.kind != "distill"), name)
    _check_distill(steps, name)
    for index, step in enumerate(steps):
        _check_follows(step, METHODS[step.method], steps[:index], name)


def _check_order(steps: tuple[Step, ...], name: str) -> None:
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


def _check_distill(steps: tuple[Step, ...], name: str) -> None:
    places = [index for index, step in enumerate(steps) if step.kind == "distill"]
    if len(places) > 1:
        raise RecipeError(f"{name!r}: a stack is distilled once")
    for index in places:
        before = steps[:index]
        if not before:
            raise RecipeError(
                f"{name!r}: {steps[index].name} needs a smaller model to train; put what makes it "
                f"smaller before it, e.g. depth-50+{steps[index].name}"
            )
        if any(METHODS[s.method].trains for s in before):
            raise RecipeError(
                f"{name!r}: {before[-1].name} trains the model already; {steps[index].name} would "
                "do it again"
            )
        if late := [s.name for s in before if s.kind in ("correct", "embed", "kv")]:
            raise RecipeError(f"{name!r}: {late[0]} must come after {steps[index].name}")


def _check_follows(step: Step, method: Method, before: tuple[Step, ...], name: str) -> None:
    """A method finds a plain weight, unless it says that it can work on more."""
    if step.kind not in ("quantize", "correct"):
        return
    for earlier in before:
        if earlier.kind not in _PLAIN | method.follows:
            raise RecipeError(
                f"{name!r}: {step.name} works on plain weights, not on what {earlier.name} leaves"
            )
    if step.kind == "correct" and any(s.base for s in before):
        raise RecipeError(
            f"{name!r}: {step.name} corrects one precision, and nested weights have two"
        )
    quantizer = next((i for i, s in enumerate(before) if s.kind == "quantize"), len(before))
    if step.kind == "correct" and any(METHODS[s.method].trains for s in before[quantizer:]):
        raise RecipeError(
            f"{name!r}: {step.name} corrects rounding, which the training before it has undone"
        )
    if step.kind == "correct" and any(s.base for s in before):
        raise RecipeError(
            f"{name!r}: {step.name} corrects one precision, and nested weights have two"
        )
    if step.kind == "correct" and not any(s.kind == "quantize" for s in before):
        raise RecipeError(
            f"{name!r}: {step.name} corrects a quantization, and none comes before it"
        )
