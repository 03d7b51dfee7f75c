"""Every compression method by name: where it is, what it needs, what to expect of it. Torch-free.

Adding a method is one file and one line in `METHODS`. Methods are imported only when a job runs, so
this module costs nothing to a process that merely names levels.

What `target` points at, by kind (weights are float32 `[N, K]`):

- `quantize`: `solve(weight, statistic, *, bits, group, symmetric) -> Grouped`
- `sparse24`: `solve(weight, statistic) -> Sparse24`
- `lowrank`:  `solve(weight, statistic, *, rank) -> LowRank`
- `depth`:    `solve(probe, *, kept) -> tuple[int, ...]`, the decoder blocks to keep
- with `whole_model`, of whatever kind: `solve(checkpoint, step, windows, sink, *, progress, device)
  -> Report`

A method that needs calibration has two more functions beside `solve`: `empty(in_features, device)`
and `accumulate(statistic, x)`; methods that share these two functions share the statistic. A
quantizer that needs it also takes `mask` (bool [N, K], False where pruned), for stacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from compressors.recipe import Recipe, Step

Kind = Literal["quantize", "sparse24", "lowrank", "depth"]
Family = Literal["dense", "quantization", "pruning", "lowrank"]


@dataclass(frozen=True, slots=True)
class Quality:
    """Against the dense model: perplexity ratio, KL (nats), top-1 agreement."""

    perplexity_ratio: float
    kl_nats: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a level is expected to be before it was measured.

    `size_ratio` is compressed ÷ dense bytes (dense stored in 16 bits).
    """

    perplexity_ratio: float
    kl_nats: float
    top1_agreement: float
    size_ratio: float


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    `prior` maps the method's strength (bits; percent kept; 50 for 2:4) to the expected quality,
    for quantization at group 128. `variant` names the method inside a level name, e.g. `gptq` in
    `int4-gptq-g128`. Codes of `symmetric_from` bits and more have no zero point of their own: at
    eight bits it gains nothing and costs bytes and kernel time. A `whole_model` method does the job
    itself and stands alone in a recipe.
    """

    variant: str
    kind: Kind
    family: Family
    target: str
    needs_calibration: bool
    prior: dict[int, Quality]
    symmetric_from: int = 8
    whole_model: bool = False

    def module(self) -> ModuleType:
        """The method's module, imported now."""
        return import_module(self.target.partition(":")[0])

    def load(self) -> Callable[..., Any]:
        """The method's callable, imported now."""
        solve: Callable[..., Any] = getattr(self.module(), self.target.partition(":")[2])
        return solve


# Priors: perplexity ratio, KL, top-1 agreement. Measured with these methods on a small trained
# Llama (17M parameters, the bundled model; 48 windows of 512 tokens of held-out text), which is the
# hard case: larger models lose less. The order of methods agrees with the published one (GPTQ
# arXiv:2210.17323 table 3, HQQ blog table 1, Wanda arXiv:2306.11695 table 3, SVD-LLM
# arXiv:2403.07378 table 1, ShortGPT arXiv:2403.03853 table 2).
_RTN = {
    8: Quality(1.0004, 0.0004, 0.989),
    4: Quality(1.055, 0.072, 0.872),
    3: Quality(1.335, 0.372, 0.717),
    2: Quality(19.4, 3.19, 0.193),
}
_HQQ = {
    8: Quality(1.0004, 0.0004, 0.989),
    4: Quality(1.043, 0.063, 0.879),
    3: Quality(1.183, 0.245, 0.770),
    2: Quality(2.69, 1.196, 0.496),
}
_GPTQ = {
    8: Quality(1.0001, 0.0002, 0.993),
    4: Quality(1.023, 0.043, 0.899),
    3: Quality(1.115, 0.165, 0.814),
    2: Quality(1.77, 0.749, 0.605),
}
# Symmetric: the range that a zero point would save costs more than GPTQ gains below four bits.
_AUTOGPTQ = {
    8: Quality(1.0002, 0.0002, 0.992),
    4: Quality(1.037, 0.063, 0.883),
    3: Quality(1.269, 0.313, 0.738),
    2: Quality(9.99, 2.534, 0.287),
}
_MAGNITUDE24 = {50: Quality(3.09, 1.343, 0.470)}
_WANDA24 = {50: Quality(2.30, 1.035, 0.539)}
_DEPTH = {
    88: Quality(1.243, 0.305, 0.745),
    75: Quality(1.79, 0.742, 0.606),
    62: Quality(2.94, 1.306, 0.479),
    50: Quality(5.33, 1.916, 0.376),
    25: Quality(23.3, 3.434, 0.200),
}
_SVD = {
    90: Quality(1.222, 0.317, 0.746),
    80: Quality(1.363, 0.461, 0.694),
    60: Quality(2.09, 0.964, 0.574),
    40: Quality(5.78, 2.053, 0.400),
}

_QUANTIZE, _PRUNE, _LOWRANK = "compressors.quantize", "compressors.prune", "compressors.lowrank"
METHODS: dict[str, Method] = {
    "rtn": Method("rtn", "quantize", "quantization", f"{_QUANTIZE}.rtn:solve", False, _RTN),
    "hqq": Method("hqq", "quantize", "quantization", f"{_QUANTIZE}.hqq:solve", False, _HQQ, 9),
    "gptq": Method("gptq", "quantize", "quantization", f"{_QUANTIZE}.gptq:solve", True, _GPTQ),
    "autogptq": Method(
        "autogptq",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.autogptq:solve",
        True,
        _AUTOGPTQ,
        0,
        True,
    ),
    "magnitude": Method(
        "magnitude", "sparse24", "pruning", f"{_PRUNE}.magnitude:solve", False, _MAGNITUDE24
    ),
    "wanda": Method("wanda", "sparse24", "pruning", f"{_PRUNE}.wanda:solve", True, _WANDA24),
    "depth": Method("depth", "depth", "pruning", f"{_PRUNE}.depth:solve", True, _DEPTH),
    "svd": Method("svd", "lowrank", "lowrank", f"{_LOWRANK}.svd:solve", True, _SVD),
}

# Loss in nats relative to group 128, from the round-to-nearest rows 1.034/1.040/1.055/1.080 at
# g32/g64/g128/per channel.
_GROUP_FACTOR = {16: 0.55, 32: 0.62, 64: 0.73, 128: 1.0, 256: 1.15}
_PER_CHANNEL_FACTOR = 1.45


def variants(kind: Kind) -> tuple[str, ...]:
    """Method names of one kind, as they appear in level names."""
    return tuple(method.variant for method in METHODS.values() if method.kind == kind)


def estimate(recipe: Recipe, *, linear_share: float = 1.0) -> Estimate:
    """What to expect of `recipe` before it is measured; losses of stacked steps add up in nats.

    Args:
        linear_share: part of the dense model's bytes that the decoder blocks hold (the rest,
            embeddings and head, stays as it is), so that `size_ratio` is of the whole model.
    """
    loss, kl, disagreement, blocks = 0.0, 0.0, 0.0, 1.0
    for step in recipe.steps:
        quality, factor = _step_quality(step)
        loss += math.log(quality.perplexity_ratio) * factor
        kl += quality.kl_nats * factor
        disagreement += (1.0 - quality.top1_agreement) * math.sqrt(factor)
        blocks *= _step_size(step, recipe)
    rest = 2.0 if recipe.dtype == "fp32" else 1.0
    size = rest if not recipe.steps else linear_share * blocks + (1.0 - linear_share)
    return Estimate(math.exp(loss), kl, max(0.0, 1.0 - disagreement), size)


def _step_quality(step: Step) -> tuple[Quality, float]:
    prior = METHODS[step.method].prior
    if step.kind == "quantize":
        factor = (
            _PER_CHANNEL_FACTOR
            if step.group is None
            else _GROUP_FACTOR[min(_GROUP_FACTOR, key=lambda g: abs(g - (step.group or 0)))]
        )
        return prior[step.bits], factor
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
        return (step.bits + overhead) / 16
    if step.kind == "sparse24":
        # Half the values and two bits of index for each; a later step shrinks values, not indexes.
        later = next((s for s in recipe.steps if s.kind == "quantize"), None)
        bits = later.bits if later else 16
        return 0.5 + 0.5 * 2 / bits
    return step.percent / 100
