"""One step of a recipe: a method with its settings, and how it is written. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compressors.registry import METHODS, Kind


@dataclass(frozen=True, slots=True)
class Step:
    """One method with its settings. Fields that a kind does not use keep their defaults.

    Attributes:
        method: key of `registry.METHODS`.
        kind: what it does to the model, see `registry`.
        bits: width of a code (`quantize`, `embed`, `kv`), else 16.
        group: columns that share a scale; None is one scale per output channel (`quantize`).
        symmetric: zero point fixed at half range (`quantize`).
        act_order: columns of large inputs are quantized first (`quantize`, GPTQ).
        base: the quantizer whose codes are the high half (`quantize`, nested), else empty.
        child: of a nested level: 8 or 4, the bits computed with; 0 where it means the parent.
        pattern: `24`, `48` or `50`: of every four two kept, of eight four, of all half (`sparse`).
        percent: of layers (`depth`), of heads and channels (`width`) or of parameters (`lowrank`)
            kept; 50 for `sparse`.
        rank: of a low-rank correction (`correct`).
    """

    method: str
    kind: Kind
    bits: int = 16
    group: int | None = None
    symmetric: bool = False
    act_order: bool = False
    base: str = ""
    child: int = 0
    pattern: str = ""
    percent: int = 100
    rank: int = 0

    @property
    def name(self) -> str:
        """Canonical spelling."""
        return _NAMES[self.kind](self)

    @property
    def needs_calibration(self) -> bool:
        own = METHODS[self.method].needs_calibration
        return own or (bool(self.base) and METHODS[self.base].needs_calibration)

    def group_columns(self, in_features: int) -> int:
        """Columns per group for a layer of that width: never more than it has."""
        return in_features if self.group is None else min(self.group, in_features)


def _codes(step: Step) -> str:
    """Name of a quantization step."""
    if METHODS[step.method].spelled == "name":
        return METHODS[step.method].variant
    group = f"g{step.group or 'ch'}"
    if step.base:
        child = f"@int{step.child}" if step.child else ""
        return f"nested84-{METHODS[step.base].variant}-{group}{child}"
    if (step.method, step.bits, step.group, step.symmetric) == ("rtn", 8, None, True):
        return "int8"
    sym = "-sym" if step.symmetric and step.bits < METHODS[step.method].symmetric_from else ""
    act = "-act" if step.act_order else ""
    return f"int{step.bits}-{METHODS[step.method].variant}-{group}{sym}{act}"


def _variant(step: Step) -> str:
    return METHODS[step.method].variant


_NAMES: dict[Kind, Callable[[Step], str]] = {
    "depth": lambda step: f"depth-{step.percent}",
    "width": lambda step: f"width-{step.percent}",
    "lowrank": lambda step: f"lowrank-{step.percent}",
    "sparse": lambda step: f"sparse{step.pattern}-{_variant(step)}",
    "quantize": _codes,
    "correct": lambda step: f"{_variant(step)}-{step.rank}",
    "distill": lambda step: f"distill-{_variant(step)}",
    "embed": lambda step: f"embed{step.bits}",
    "kv": lambda step: f"kv{step.bits}",
}
