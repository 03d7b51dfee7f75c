"""What a compression job takes and gives: the seams between methods, pipeline and whoever stores.

A method is one pure-tensor file; the pipeline feeds it, a `Sink` takes what comes out. Nothing here
knows of files, caches or the gateway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from compressors.tensor import LinearForm

ProgressFn = Callable[[float, str], None]
"""Called with (share done 0..1, what is being done now). Raising from it cancels the job."""


class CompressionError(Exception):
    """The job cannot be done; the message names the layer or the setting at fault."""


class Sink(Protocol):
    """Takes the compressed model piece by piece, in any order, each piece once.

    A piece may be dropped from memory as soon as the call returns.
    """

    def config(self, config: dict[str, Any]) -> None:
        """The transformers config (JSON) of the compressed model, e.g. with fewer layers."""

    def tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor that stays as it is (embedding, norm, bias, uncompressed weight)."""

    def linear(self, module: str, form: LinearForm) -> None:
        """The weight of linear `module` (e.g. `model.layers.0.mlp.up_proj`) in compressed form."""


@dataclass(frozen=True)
class LayerReport:
    """One linear of the report: what was done and what it cost."""

    module: str
    scheme: str
    bytes_before: int
    bytes_after: int
    relative_error: float  # ‖XW − XŴ‖ / ‖XW‖ on calibration inputs, or weight error when data-free
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a finished job did: per layer, what was skipped and why, seconds by phase."""

    recipe: str
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    seconds: dict[str, float]
    calibration_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)
