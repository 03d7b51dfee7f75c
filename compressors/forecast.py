"""What a job will take, from shapes alone: memory and time before anything is read. Torch-free.

Peak memory is that of `pipeline`: one linear per thread without text; with text one block in
float32, the statistics of its widest input and what solving from them needs, and the activations of
a batch. Shares of mapped files that are being read count too.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressors.recipe import Recipe
from compressors.registry import METHODS

TOKENS = 16384  # of calibration text when the caller gives none
_BATCH_TOKENS = 4096  # as `walk`
_WORK = 18  # bytes per weight: float32, codes, their packed form, what it stands for, temporaries
_SOLVE = 5  # K×K float32 matrices besides the statistic: damped, factored, inverted, ordered
_ACTIVATIONS = 6  # tensors [tokens, widest] of a batch alive at once
_FIXED = 48 * 2**20  # allocator, buffers of files being written
_TRAINED = 24  # bytes per weight: float32, gradient, two moments, the compressed and dense weight
_LOGITS = 2**24 * 40  # bytes of logits of a step, both models', and what the loss makes of them
# Seconds on a CPU core ÷ seconds on a GPU: a guess. Methods differ widely, and so do GPUs.
_CUDA_GAIN = 40.0
_WALK_FLOPS = 60e9  # multiply-adds ×2 per second and core


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is needed to know of a model.

    Attributes:
        blocks: per decoder block (N, K) of its linears.
        item_size: bytes of a stored weight.
        hidden: width between blocks.
        largest: bytes of the largest tensor outside the blocks (embedding, head).
    """

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    item_size: int
    hidden: int
    largest: int

    @property
    def weights(self) -> int:
        return sum(n * k for block in self.blocks for n, k in block)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Peak bytes that the job adds to its process, and seconds it takes on idle cores."""

    peak_bytes: int
    seconds: float


def forecast(
    shapes: Shapes,
    recipe: Recipe,
    *,
    threads: int = 1,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> Forecast:
    """What compressing such a model so will take."""
    abreast = threads if device == "cpu" else 1
    seconds = _seconds(shapes, recipe, tokens) / (abreast if device == "cpu" else _CUDA_GAIN)
    return Forecast(_peak(shapes, recipe, abreast, tokens), seconds)


def _peak(shapes: Shapes, recipe: Recipe, threads: int, tokens: int) -> int:
    linears = sorted((n * k for block in shapes.blocks for n, k in block), reverse=True)
    work = (_WORK + shapes.item_size) * sum(linears[: threads + 1])
    if not recipe.needs_calibration:
        return _FIXED + shapes.largest + work
    block = max((sum(n * k for n, k in block) for block in shapes.blocks), default=0)
    widest = max((max(n, k) for block in shapes.blocks for n, k in block), default=0)
    deepest = max((k for block in shapes.blocks for _, k in block), default=0)
    batch = min(tokens, _BATCH_TOKENS)
    states = 4 * tokens * shapes.hidden * 2
    activations = 4 * batch * widest * _ACTIVATIONS * (threads + 1)
    statistics = 4 * deepest * deepest * (1 + _SOLVE * threads)
    weights = (4 + shapes.item_size) * block
    training = 0
    if any(METHODS[step.method].trains for step in recipe.steps):
        training = _TRAINED * shapes.weights + _LOGITS
    return _FIXED + shapes.largest + work + weights + statistics + states + activations + training


def _seconds(shapes: Shapes, recipe: Recipe, tokens: int) -> float:
    dense = shapes.weights * shapes.item_size
    seconds = sum(
        dense / METHODS[step.method].build_bytes_per_s
        for step in recipe.steps
        if step.kind not in ("embed", "kv")
    )
    if recipe.needs_calibration:
        # Every block runs once per input of its linears (about four) and once to go on; statistics
        # cost as much as two runs.
        seconds += 7 * 2 * shapes.weights * tokens / _WALK_FLOPS
    return seconds


def refusal(recipe: Recipe, expected: Forecast, free: int | None) -> str:
    """Why the job must not start in so many free bytes; empty when it may."""
    if free is None or expected.peak_bytes <= free:
        return ""
    return (
        f"{recipe.name} takes about {expected.peak_bytes / 1e9:.1f} GB of memory to build, and "
        f"{free / 1e9:.1f} GB are free here"
    )
