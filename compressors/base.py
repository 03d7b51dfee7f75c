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

    A piece may be dropped from memory as soon as the call returns. Calls may come from several
    threads at once.
    """

    def config(self, config: dict[str, Any]) -> None:
        """The transformers config (JSON) of the compressed model, e.g. with fewer layers."""

    def tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor that stays as it is (embedding, norm, bias, uncompressed weight)."""

    def linear(self, module: str, form: LinearForm) -> None:
        """The weight of linear `module` (e.g. `model.layers.0.mlp.up_proj`) in compressed form."""


@dataclass(frozen=True)
class Milestone:
    """How far a job came.

    Attributes:
        blocks: decoder blocks that are done and in the sink.
        facts: what the job needs to go on (JSON).
        hidden: the inputs of the next block, float [B, length, hidden size] per batch; empty when
            the job needs no text.
    """

    blocks: int
    facts: dict[str, Any]
    hidden: tuple[Tensor, ...] = ()


class Journal(Protocol):
    """Keeps a job's milestones, so that one that was killed goes on where it was.

    What `load` returns must come from a job with equal arguments, and the sink must still have all
    pieces that it had been given at that moment.
    """

    def load(self) -> Milestone | None:
        """The last milestone, None to begin at the beginning."""

    def save(self, milestone: Milestone) -> None:
        """Replace the last milestone. May decide that it is too early for another one."""


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
