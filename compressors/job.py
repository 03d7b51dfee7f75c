"""What one compression job carries along: where things go, what was done, how far it came.

Owns progress, the clock and the journal, and every write into the sink: a linear, a table of
embeddings, a tensor as it is. In which order is `pipeline`'s and `blocks`'.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from compressors.apply import compress_linear
from compressors.base import CompressionError, Journal, LayerReport, Milestone, ProgressFn, Sink
from compressors.model import torch_dtype
from compressors.observe import Observer, relative_error
from compressors.parallel import Lanes
from compressors.plan import LinearPlan, Plan
from compressors.recipe import Recipe
from compressors.registry import METHODS
from compressors.tables import tables
from compressors.tensor import LinearForm
from compressors.together import moved


@dataclass
class Job:
    """One run of a recipe.

    Attributes:
        device, lanes: where it computes.
        journal: keeps how far it came; None when nothing could go on from there.
        layers, skipped, seconds: as in `base.Report`.
        kept: numbers of the blocks that a depth step keeps, once they are chosen.
    """

    recipe: Recipe
    sink: Sink
    progress: ProgressFn | None
    device: torch.device | str
    journal: Journal | None
    lanes: Lanes
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    kept: tuple[int, ...] | None = None
    _behind: float = 0.0  # share of the progress that choices made before the blocks have taken
    _done: int = 0  # weights compressed

    def __post_init__(self) -> None:
        self._cast = torch_dtype(self.recipe.dtype) if self.recipe.dtype else None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note how many seconds `phase` takes."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)

    def report(self, share: float, what: str) -> None:
        """Tell that `share`, 0..1, of what is not behind yet is done."""
        if self.progress:
            self.progress(self._behind + (1.0 - self._behind) * share, what)

    def put_behind(self, share: float) -> None:
        """Count `share` of the progress that was left as done; reports begin from there."""
        self._behind += (1.0 - self._behind) * share

    def resume(self) -> Milestone:
        """Where to go on: what an earlier run of the same job left, or the beginning."""
        milestone = None if self.journal is None else self.journal.load()
        if milestone is None:
            return Milestone(0, {})
        facts = milestone.facts
        self.layers = [LayerReport(**layer) for layer in facts["layers"]]
        self.skipped = dict(facts["skipped"])
        self.kept = None if facts["kept"] is None else tuple(facts["kept"])
        return milestone

    def skip_done(self, plan: Plan, start: Milestone) -> None:
        """Count the weights of the blocks before `start` as compressed."""
        for rows in plan.linears[: start.blocks]:
            self._done += sum(row.shape[0] * row.shape[1] for row in rows if row.steps)

    def write_outside(self, plan: Plan) -> None:
        """The config and everything that is in no block."""
        config = dict(plan.config)
        if self._cast is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self._cast).removeprefix("torch.")
        self.sink.config(config)
        quantized: dict[str, str] = {}
        if self.recipe.step("embed"):
            quantized, left = tables(plan.source.model)
            self.skipped |= left
        for name in plan.source.outside():
            if name in quantized:
                self._table(plan, name, quantized[name])
            else:
                self._pass_through(plan, name)

    def _table(self, plan: Plan, name: str, module: str) -> None:
        """Quantize parameter `name`, an embedding, a head or both, into the sink."""
        step = self.recipe.step("embed")
        assert step is not None
        start = time.perf_counter()
        stored = plan.source.read(name)
        try:
            form = METHODS[step.method].load()(stored.to(self.device), bits=step.bits)
        except ValueError as error:
            raise CompressionError(f"{module}: {error}") from error
        form = form.stored_as(stored.dtype)
        self.sink.linear(module, form)
        dense = form.dense(torch.float32)
        layer = LayerReport(
            module=module,
            scheme=form.scheme,
            bytes_before=stored.numel() * stored.element_size(),
            bytes_after=form.nbytes,
            relative_error=relative_error(stored.float(), dense, None),
            seconds=round(time.perf_counter() - start, 4),
        )
        if module not in {done.module for done in self.layers}:  # a resumed job has it
            self.layers.append(layer)
        plan.source.release(name)
        self.report(0.0, module)

    def linear(
        self,
        plan: Plan,
        row: LinearPlan,
        weight: Tensor,
        observer: Observer | None = None,
        form: LinearForm | None = None,
    ) -> tuple[LayerReport, Tensor]:
        """Compress weight [N, K], unless its form is known, into the sink; also what it now stands
        for, float32 [N, K]."""
        start = time.perf_counter()
        stored = plan.source.read(f"{row.module}.weight")
        weight = weight.float()
        statistics = observer.statistics if observer else {}
        try:
            form = form or compress_linear(
                weight,
                row.steps,
                statistics,
                rank=row.rank,
                dtype=stored.dtype,
                given=plan.source.checkpoint.forms.get(row.module),
            )
        except ValueError as error:
            raise CompressionError(f"{row.module}: {error}") from error
        self.sink.linear(row.module, form)
        dense = moved(form, self.device).dense(torch.float32)
        layer = LayerReport(
            module=row.module,
            scheme=form.scheme,
            bytes_before=stored.numel() * stored.element_size(),
            bytes_after=form.nbytes,
            relative_error=relative_error(weight, dense, observer.sample if observer else None),
            seconds=round(time.perf_counter() - start, 4),
            note=row.note,
        )
        plan.source.release(f"{row.module}.weight")
        return layer, dense

    def compressed(self, plan: Plan, row: LinearPlan, layer: LayerReport) -> None:
        """Note that a linear is done."""
        self.layers.append(layer)
        self._done += row.shape[0] * row.shape[1]
        self.report(self._done / plan.weights, row.module)

    def finish_block(
        self, plan: Plan, index: int, done: set[str], hidden: tuple[Tensor, ...] = ()
    ) -> None:
        """Write what stays as it is of block `index`; then the block is done.

        Args:
            done: parameters that are written, by name inside the block.
            hidden: what the block gives, for a run that goes on from here.
        """
        for row in plan.linears[index]:
            if row.note and not row.steps:
                self.skipped[row.module] = row.note
        for name, full in plan.source.of_block(index).items():
            if name not in done:
                self._pass_through(plan, full)
        self._note_fused(plan, index)
        if self.journal is not None and index + 1 < len(plan.linears):
            layers = [asdict(layer) for layer in self.layers]
            facts = {"layers": layers, "skipped": self.skipped, "kept": self.kept}
            self.journal.save(Milestone(index + 1, facts, hidden))
        self.report((index + 1) / len(plan.linears), f"{plan.source.blocks.prefix(index)} done")

    def _note_fused(self, plan: Plan, index: int) -> None:
        """Matrices that are no linears are left alone, and the report says so."""
        if not any(row.steps for row in plan.linears[index]):
            return
        prefix = plan.source.blocks.prefix(index)
        for name, parameter in plan.source.blocks.modules[index].named_parameters():
            if parameter.ndim > 2:
                self.skipped[f"{prefix}.{name}"] = "a fused parameter of an unknown kind"

    def _pass_through(self, plan: Plan, name: str) -> None:
        tensor = plan.source.read(name)
        if self._cast is not None and tensor.is_floating_point():
            tensor = tensor.to(self._cast)
        self.sink.tensor(name, tensor)
        plan.source.release(name)
