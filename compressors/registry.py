"""Every compression method by name: where it is, what it needs, what to expect of it. Torch-free.

Adding a method is one file and one line in `METHODS`. Methods are imported only when a job runs, so
this module costs nothing to a process that merely names levels.

What `target` points at, by kind (weights are float32 `[N, K]`):

- `quantize`: `solve(weight, statistic, *, bits, group, symmetric) -> LinearForm`
  (with the option `act` also `act_order`)
  (with `spelled` nested also `high`, the `solve` of the base method)
- `sparse`:   `solve(weight, statistic, *, pattern) -> Sparse24` for 2:4, else `Bitmap`
- `lowrank`:  `solve(weight, statistic, *, rank) -> LowRank`
- `correct`:  `solve(weight, statistic, *, form, rank) -> LinearForm`, `form` being what came before
- `depth`:    `solve(probe, *, kept) -> tuple[int, ...]`, the decoder blocks to keep
- `width`:    `solve(weight, statistic, *, unit, kept, biased) -> Cut`: of what reads them
- `embed`:    `solve(weight, *, bits) -> Table`, the weight [V, H] in its own dtype
- `distill`:  `objective() -> Objective`, and of every method that `trains`
- `kv`:       the codec of keys; serving calls it, a job leaves the weights as they are
- with `whole_model`, of whatever kind: `solve(checkpoint, step, windows, sink, *, progress, device)
  -> Report`

A method that needs calibration has two more functions beside `solve`: `empty(in_features, device)`
and `accumulate(statistic, x)`; methods that share these two functions share the statistic. A
quantizer that can follow `sparse` and needs calibration also takes `mask` (bool [N, K], False where
pruned, equally many True per row); its groups and its result, [N, kept], are then of what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from compressors import priors
from compressors.priors import Quality

Kind = Literal[
    "depth", "width", "lowrank", "sparse", "quantize", "correct", "distill", "embed", "kv"
]
Family = Literal["dense", "quantization", "pruning", "lowrank", "distillation", "kv-cache"]


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        variant: the method inside a level name, e.g. `gptq` in `int4-gptq-g128`.
        prior: the method's strength (bits; percent kept; pattern as a number) → expected quality,
            for quantization at group 128.
        symmetric_from: codes of so many bits and more have no zero point of their own: at eight
            bits it gains nothing and costs bytes and kernel time.
        whole_model: it does the job itself and stands alone in a recipe.
        spelled: a quantizer's level name is `int<bits>-<variant>-g<group>` (`settings`) or the
            variant itself (`name`); `nested` is spelled after its base, see `grammar`.
        options: of `sym` and `act`, the endings a level name may have.
        follows: kinds whose result a quantizer or a correction can work on, besides plain weights.
        nests: its 4-bit codes can be the high half of a nested parent.
        by_row: rows of a weight do not see each other: linears of one input may be solved as one.
        recovers: share of the loss so far, in nats, that the step gives back.
        trains: it trains the model, which the steps before it made, see `distill.job`.
        build_bytes_per_s: dense bytes of the blocks a core gets through in a second, measured.
    """

    variant: str
    kind: Kind
    family: Family
    target: str
    needs_calibration: bool
    prior: dict[int, Quality]
    symmetric_from: int = 8
    whole_model: bool = False
    spelled: Literal["settings", "name", "nested"] = "settings"
    options: frozenset[str] = frozenset()
    follows: frozenset[Kind] = frozenset()
    nests: bool = False
    by_row: bool = False
    recovers: float = 0.0
    trains: bool = False
    build_bytes_per_s: float = 20e6

    def module(self) -> ModuleType:
        """The method's module, imported now."""
        return import_module(self.target.partition(":")[0])

    def load(self) -> Callable[..., Any]:
        """The method's callable, imported now."""
        solve: Callable[..., Any] = getattr(self.module(), self.target.partition(":")[2])
        return solve


_QUANTIZE, _PRUNE, _LOWRANK = "compressors.quantize", "compressors.prune", "compressors.lowrank"
_DISTILL = "compressors.distill"
_ON_FORMS: frozenset[Kind] = frozenset({"lowrank", "sparse"})
METHODS: dict[str, Method] = {
    "rtn": Method(
        "rtn",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.rtn:solve",
        False,
        priors.RTN,
        by_row=True,
        build_bytes_per_s=200e6,
        options=frozenset({"sym"}),
        follows=_ON_FORMS,
    ),
    "hqq": Method(
        "hqq",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.hqq:solve",
        False,
        priors.HQQ,
        by_row=True,
        build_bytes_per_s=24e6,
        symmetric_from=9,
        options=frozenset({"sym"}),
        follows=_ON_FORMS,
        nests=True,
    ),
    "gptq": Method(
        "gptq",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.gptq:solve",
        True,
        priors.GPTQ,
        by_row=True,
        build_bytes_per_s=15e6,
        options=frozenset({"sym", "act"}),
        follows=_ON_FORMS,
        nests=True,
    ),
    "awq": Method(
        "awq",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.awq:solve",
        True,
        priors.AWQ,
        build_bytes_per_s=3.5e6,
        options=frozenset({"sym"}),
        follows=frozenset({"lowrank"}),
    ),
    "rot": Method(
        "rot",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.rotation:solve",
        True,
        priors.ROT,
        options=frozenset({"sym"}),
        follows=frozenset({"lowrank"}),
    ),
    "autogptq": Method(
        "autogptq",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.autogptq:solve",
        True,
        priors.AUTOGPTQ,
        symmetric_from=0,
        whole_model=True,
    ),
    "nested": Method(
        "nested",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.nested:solve",
        False,  # its base may
        priors.NESTED,
        spelled="nested",
    ),
    "w8a8": Method(
        "w8a8",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.w8a8:solve",
        False,
        priors.W8A8,
        spelled="name",
        follows=frozenset({"lowrank"}),
        build_bytes_per_s=500e6,
    ),
    "w8a8-smoothquant": Method(
        "w8a8-smoothquant",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.smoothquant:solve",
        True,
        priors.SMOOTHQUANT,
        spelled="name",
        build_bytes_per_s=15e6,
    ),
    "w8a8-outlier": Method(
        "w8a8-outlier",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.outlier:solve",
        True,
        priors.OUTLIER,
        spelled="name",
        build_bytes_per_s=300e6,
    ),
    "fp8": Method(
        "fp8",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.fp8:solve",
        False,
        priors.FP8,
        build_bytes_per_s=500e6,
        spelled="name",
        follows=frozenset({"lowrank"}),
    ),
    "magnitude": Method(
        "magnitude", "sparse", "pruning", f"{_PRUNE}.magnitude:solve", False, priors.MAGNITUDE
    ),
    "wanda": Method("wanda", "sparse", "pruning", f"{_PRUNE}.wanda:solve", True, priors.WANDA),
    "sparsegpt": Method(
        "sparsegpt", "sparse", "pruning", f"{_PRUNE}.sparsegpt:solve", True, priors.SPARSEGPT
    ),
    "depth": Method("depth", "depth", "pruning", f"{_PRUNE}.depth:solve", True, priors.DEPTH),
    "width": Method("width", "width", "pruning", f"{_PRUNE}.width:solve", True, priors.WIDTH),
    "lorc": Method(
        "lorc",
        "correct",
        "quantization",
        f"{_LOWRANK}.lorc:solve",
        False,  # it looks at the text that a step before it needs
        {},
        follows=frozenset({"quantize", "sparse"}),
        recovers=0.17,
    ),
    "svd": Method("svd", "lowrank", "lowrank", f"{_LOWRANK}.svd:solve", True, priors.SVD),
    "kl": Method(
        "kl",
        "distill",
        "distillation",
        f"{_DISTILL}.kl:objective",
        True,
        {},
        recovers=0.6,
        trains=True,
        build_bytes_per_s=45e3,
    ),
    "rkl": Method(
        "rkl",
        "distill",
        "distillation",
        f"{_DISTILL}.rkl:objective",
        True,
        {},
        recovers=0.55,
        trains=True,
        build_bytes_per_s=45e3,
    ),
    "seq": Method(
        "seq",
        "distill",
        "distillation",
        f"{_DISTILL}.seq:objective",
        True,
        {},
        recovers=0.5,
        trains=True,
        build_bytes_per_s=45e3,
    ),
    "qat": Method(
        "qat",
        "quantize",
        "quantization",
        f"{_QUANTIZE}.qat:objective",
        True,
        priors.QAT,
        options=frozenset({"sym"}),
        trains=True,
        build_bytes_per_s=45e3,
    ),
    "embed": Method(
        "embed", "embed", "quantization", f"{_QUANTIZE}.embed:solve", False, priors.EMBED
    ),
    "kivi": Method("kivi", "kv", "kv-cache", f"{_QUANTIZE}.kv:encode_keys", False, priors.KIVI),
}


def variants(kind: Kind) -> tuple[str, ...]:
    """Method names of one kind, as they appear in level names."""
    return tuple(method.variant for method in METHODS.values() if method.kind == kind)
