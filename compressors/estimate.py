"""What to expect of a recipe before it was built and measured. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressors.priors import Quality
from compressors.recipe import Recipe
from compressors.registry import METHODS
from compressors.step import Step

# Loss in nats relative to group 128, from the round-to-nearest rows 1.034/1.040/1.055/1.080 at
# g32/g64/g128/per channel.
_GROUP_FACTOR = {16: 0.55, 32: 0.62, 64: 0.73, 128: 1.0, 256: 1.15}
_PER_CHANNEL_FACTOR = 1.45
_TYPICAL_WIDTH = 512  # of a layer that is corrected
_FACTOR_BITS = 8  # of the correction


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a level is expected to be before it was measured.

    `size_ratio` is compressed ÷ dense bytes (dense stored in 16 bits).
    """

    perplexity_ratio: float
    kl_nats: float
    top1_agreement: float
    size_ratio: float


def estimate(recipe: Recipe, *, linear_share: float = 1.0) -> Estimate:
    """What to expect of `recipe` before it is measured; losses of stacked steps add up in nats.

    Args:
        linear_share: part of the dense model's bytes that the decoder blocks hold (the rest,
            embeddings and head, stays as it is), so that `size_ratio` is of the whole model.
    """
    loss, kl, disagreement, blocks, rest = 0.0, 0.0, 0.0, 1.0, 1.0
    for step in recipe.steps:
        quality, factor = _step_quality(step)
        left = 1.0 - METHODS[step.method].recovers
        loss = loss * left + math.log(quality.perplexity_ratio) * factor
        kl = kl * left + quality.kl_nats * factor
        disagreement *= math.sqrt(left)  # healed models agree less often than their loss suggests
        disagreement += (1.0 - quality.top1_agreement) * math.sqrt(factor)
        if step.kind == "embed":
            rest = (step.bits + (1 if step.bits == 4 else 0)) / 16  # groups of 32, with zeros
        blocks *= _step_size(step, recipe)
    whole = 2.0 if recipe.dtype == "fp32" else 1.0
    size = whole if not recipe.steps else linear_share * blocks + (1.0 - linear_share) * rest
    return Estimate(math.exp(loss), kl, max(0.0, 1.0 - disagreement), size)


_LOSSLESS = Quality(1.0, 0.0, 1.0)


def _step_quality(step: Step) -> tuple[Quality, float]:
    prior = METHODS[step.method].prior
    if step.kind in ("embed", "kv"):
        return prior[step.bits], 1.0
    if METHODS[step.method].spelled == "name":
        return prior[step.bits], 1.0
    if step.kind == "quantize":
        factor = (
            _PER_CHANNEL_FACTOR
            if step.group is None
            else _GROUP_FACTOR[min(_GROUP_FACTOR, key=lambda g: abs(g - (step.group or 0)))]
        )
        return prior[step.child or step.bits], factor
    if step.kind == "sparse":
        return prior[int(step.pattern)], 1.0
    if step.kind in ("correct", "distill"):
        return _LOSSLESS, 1.0
    return _interpolate(prior, step.percent), 1.0


def _interpolate(prior: dict[int, Quality], percent: int) -> Quality:
    """Quality at `percent` kept: piecewise linear in nats between known points, dense at 100."""
    points = sorted({100: Quality(1.0, 0.0, 1.0), **prior}.items())
    if percent <= points[0][0]:
        return points[0][1]
    upper = next(i for i, (p, _) in enumerate(points) if p >= percent)
    (p0, q0), (p1, q1) = points[upper - 1], points[upper]
    t = (percent - p0) / (p1 - p0)
    return Quality(
        math.exp((1 - t) * math.log(q0.perplexity_ratio) + t * math.log(q1.perplexity_ratio)),
        (1 - t) * q0.kl_nats + t * q1.kl_nats,
        (1 - t) * q0.top1_agreement + t * q1.top1_agreement,
    )


def _step_size(step: Step, recipe: Recipe) -> float:
    """Bytes of the blocks' linears after ÷ before this step."""
    if step.kind == "quantize":
        # A group carries a 16-bit scale and a 16-bit zero (none when symmetric).
        overhead = 0.0 if step.group is None else (16 if step.symmetric else 32) / step.group
        return ((step.child or step.bits) + overhead) / 16
    if step.kind == "sparse":
        # Half the values, and an index: two bits for each of 2:4, else a bit for every weight. A
        # later step shrinks values, not indexes.
        later = next((s for s in recipe.steps if s.kind == "quantize"), None)
        index = 2 * 0.5 if step.pattern == "24" else 1.0
        return 0.5 + index / (later.bits if later else 16)
    if step.kind == "correct":
        coded = next(s for s in recipe.steps if s.kind == "quantize")
        return 1.0 + step.rank * 2 * _FACTOR_BITS / (_TYPICAL_WIDTH * coded.bits)
    if step.kind in ("depth", "width", "lowrank"):
        return step.percent / 100
    return 1.0
