"""A whole compression job: from a checkpoint, through a recipe, into a sink.

Block by block from the mapped file: one block's weights are materialised, compressed in the order
in which the block uses them, each on the inputs that the already-compressed part before it gives,
written to the sink and let go. The dense model is never held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressors.apply import compress_linear
from compressors.base import (
    CompressionError,
    Journal,
    LayerReport,
    Milestone,
    ProgressFn,
    Report,
    Sink,
)
from compressors.calibration import Calibration
from compressors.model import Checkpoint, set_tensor, torch_dtype, weight_of
from compressors.narrow import narrow, plan_width
from compressors.observe import Observer, relative_error
from compressors.parallel import Lanes
from compressors.plan import (
    NO_LINEARS,
    LinearPlan,
    Plan,
    blocks_kept,
    check_calibration,
    keep_blocks,
    make_plan,
    open_source,
)
from compressors.probe import DepthProbe
from compressors.ranks import share_ranks
from compressors.recipe import Recipe
from compressors.registry import METHODS
from compressors.tables import tables
from compressors.tensor import LinearForm
from compressors.together import compress_together, moved
from compressors.walk import Source, Walk

_CHOICE_SHARE = 0.3  # of the progress that is left, when blocks, or heads and channels, are chosen
_STATISTICS_BYTES = 512 * 2**20  # of the experts that are observed in one pass, K² floats each


@dataclass(frozen=True)
class Host:
    """What a job may use.

    Attributes:
        device: where it computes.
        threads: of the CPU; None is what torch would use. The result does not depend on it.
        journal: keeps how far the job came; None when nothing could go on from there.
        scratch: folder of this job alone, where a training keeps how far it came.
        texts: folder where trainings keep text that the dense model wrote, for each other.
    """

    device: torch.device | str = "cpu"
    threads: int | None = None
    journal: Journal | None = None
    scratch: Path | None = None
    texts: Path | None = None


def compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    sink: Sink,
    calibration: Calibration | None = None,
    progress: ProgressFn | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    host: Host | None = None,
) -> Report:
    """Compress the model into `sink`; equal arguments give equal bytes.

    The job is checked whole (architecture, shapes, calibration) before anything is written. Tensors
    that are not compressed reach the sink with the checkpoint's own bytes, except that a dense
    recipe casts to its dtype.

    Args:
        progress: told of every linear; raising from it cancels the job before the next one.
        host: more than `device`, which it replaces.

    Raises:
        CompressionError: the job cannot be done; the message names the layer or setting at fault.
    """
    alone = next((step for step in recipe.steps if METHODS[step.method].whole_model), None)
    if alone is not None:
        windows = _windows(open_source(checkpoint), recipe, calibration)
        solve = METHODS[alone.method].load()
        report: Report = solve(checkpoint, alone, windows, sink, progress=progress, device=device)
        return report
    host = host or Host(device)
    if any(METHODS[step.method].trains for step in recipe.steps):
        from compressors.distill.job import distill

        return distill(
            checkpoint,
            recipe,
            sink=sink,
            calibration=calibration,
            progress=progress,
            seed=seed,
            host=host,
        )
    with torch.random.fork_rng(devices=[]), _lanes(host) as lanes:
        job = _Job(recipe, sink, progress, host, lanes)
        torch.manual_seed(seed)
        with job.timed("plan"):
            source = open_source(checkpoint)
            windows = _windows(source, recipe, calibration)
            make_plan(source, checkpoint.config, recipe)
            if width := recipe.step("width"):
                plan_width(source, checkpoint.config, width.percent)
            start = job.resume()
        config = checkpoint.config
        if recipe.step("depth") and windows is not None:
            with job.timed("depth"):
                source, config = job.drop_blocks(source, windows)
        if recipe.step("width") and windows is not None:
            with job.timed("width"):
                source, config = job.narrow(source, config, windows)
        plan = make_plan(source, config, recipe)
        if recipe.step("lowrank") and windows is not None:
            with job.timed("ranks"):
                plan = job.share_ranks(plan, windows)
        with job.timed("write"):
            job.write_outside(plan)
        with job.timed("blocks"):
            job.run(plan, windows, start)
    tokens = 0 if windows is None else windows.numel()
    return Report(recipe.name, tuple(job.layers), job.skipped, job.seconds, tokens)


def _lanes(host: Host) -> Lanes:
    """On another device than the CPU, work is in order on one stream."""
    return Lanes(host.threads if torch.device(host.device).type == "cpu" else 1)


def _windows(source: Source, recipe: Recipe, calibration: Calibration | None) -> Tensor | None:
    if not recipe.needs_calibration:
        return None
    if calibration is None:
        raise CompressionError(f"{recipe.name} needs calibration text and none was given")
    if depth := recipe.step("depth"):
        blocks_kept(len(source.blocks), depth.percent)
    return check_calibration(source, calibration)


class _Job:
    """What one run of `compress` carries along: where things go and what was done."""

    def __init__(
        self, recipe: Recipe, sink: Sink, progress: ProgressFn | None, host: Host, lanes: Lanes
    ) -> None:
        self.recipe, self.sink, self.progress = recipe, sink, progress
        self.device, self.journal, self.lanes = host.device, host.journal, lanes
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._cast = torch_dtype(recipe.dtype) if recipe.dtype else None
        self._kept: tuple[int, ...] | None = None
        self._base, self._done = 0.0, 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)

    def report(self, share: float, what: str) -> None:
        if self.progress:
            self.progress(self._base + (1.0 - self._base) * share, what)

    def resume(self) -> Milestone:
        """Where to go on: what an earlier run of the same job left, or the beginning."""
        milestone = None if self.journal is None else self.journal.load()
        if milestone is None:
            return Milestone(0, {})
        facts = milestone.facts
        self.layers = [LayerReport(**layer) for layer in facts["layers"]]
        self.skipped = dict(facts["skipped"])
        self._kept = None if facts["kept"] is None else tuple(facts["kept"])
        return milestone

    def drop_blocks(self, source: Source, windows: Tensor) -> tuple[Source, dict[str, Any]]:
        """Choose the blocks to keep by measurement; the smaller model's source and config."""
        step = self.recipe.step("depth")
        assert step is not None
        total = len(source.blocks)
        if self._kept is None:
            probe = DepthProbe(source, windows, lambda w: self.report(0.0, w), device=self.device)
            self._kept = METHODS[step.method].load()(probe, kept=blocks_kept(total, step.percent))
        for index in sorted(set(range(total)) - set(self._kept)):
            self.skipped[source.blocks.prefix(index)] = "dropped as least important"
        self._base = _CHOICE_SHARE
        return keep_blocks(source, self._kept)

    def narrow(
        self, source: Source, config: dict[str, Any], windows: Tensor
    ) -> tuple[Source, dict[str, Any]]:
        """Choose heads and channels to keep by measurement; the narrower model."""
        step = self.recipe.step("width")
        assert step is not None
        job = plan_width(source, config, step.percent)
        self.skipped |= {part: f"stay whole: {reason}" for part, reason in job.notes.items()}
        walk = Walk(source, windows, device=self.device, lanes=self.lanes)
        solve = METHODS[step.method].load()
        smaller = narrow(job, walk, solve, lambda d, w: self.report(d * _CHOICE_SHARE, w))
        self._base += (1.0 - self._base) * _CHOICE_SHARE
        return smaller, job.config

    def share_ranks(self, plan: Plan, windows: Tensor) -> Plan:
        """Choose the rank of every linear by measurement."""
        step = self.recipe.step("lowrank")
        assert step is not None

        def said(done: float, what: str) -> None:
            self.report(done * _CHOICE_SHARE, what)

        shared = share_ranks(plan, windows, step.percent, said, device=self.device)
        self._base += (1.0 - self._base) * _CHOICE_SHARE
        return shared

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

    def run(self, plan: Plan, windows: Tensor | None, start: Milestone) -> None:
        """Compress and write every block from `start` on."""
        methods = [
            step.method
            for step in self.recipe.steps
            if step.kind not in NO_LINEARS and step.needs_calibration
        ]
        if methods and (step := self.recipe.step("correct")):
            methods.append(step.method)
        for rows in plan.linears[: start.blocks]:
            self._done += sum(row.shape[0] * row.shape[1] for row in rows if row.steps)
        if methods and windows is not None:
            self._run_calibrated(plan, windows, start, methods)
        else:
            self._run_plain(plan, start)

    def _run_plain(self, plan: Plan, start: Milestone) -> None:
        """Every linear by itself, whatever block it is of."""

        def compress(row: LinearPlan) -> LayerReport:
            module = plan.source.model.get_submodule(row.module)
            stored = weight_of(module, plan.source.read(f"{row.module}.weight"))
            return self._linear(plan, row, stored.to(self.device), None)[0]

        left = plan.linears[start.blocks :]
        jobs = (row for rows in left for row in rows if row.steps)
        with closing(self.lanes.map(compress, jobs)) as layers:
            for index, rows in enumerate(left, start.blocks):
                for row in rows:
                    if row.steps:
                        self._compressed(plan, row, next(layers))
                self._finish(plan, index, {f"{row.name}.weight" for row in rows if row.steps})

    def _run_calibrated(
        self, plan: Plan, windows: Tensor, start: Milestone, methods: Sequence[str]
    ) -> None:
        """Block by block, each on what the compressed blocks before it give."""
        walk = Walk(plan.source, windows, device=self.device, lanes=self.lanes)
        if start.blocks:
            walk.hidden = [hidden.to(self.device) for hidden in start.hidden]
        for index in range(start.blocks, len(plan.linears)):
            walk.load(index)
            rows = {row.name: row for row in plan.linears[index] if row.steps}
            left = set(rows)
            for stage in walk.stages(index, list(rows)):
                for groups in _portions(stage, rows):
                    self._observed(plan, walk, index, groups, methods)
                left -= {name for group in stage for name in group}
            for name in sorted(left, key=list(rows).index):
                self._unreached(plan, index, rows[name], methods)
            walk.advance(index)
            walk.free(index)
            done = {f"{name}.weight" for name in rows}
            self._finish(plan, index, done, tuple(walk.hidden))

    def _observed(
        self, plan: Plan, walk: Walk, index: int, groups: list[list[str]], methods: Sequence[str]
    ) -> None:
        """Compress linears of block `index` on what one pass over the text shows them."""
        rows = {row.name: row for row in plan.linears[index]}
        observers = {
            group[0]: Observer(methods, rows[group[0]].shape[1], self.device) for group in groups
        }
        for seen in walk.inputs(index, list(observers)):
            for name, x in seen.items():
                observers[name](x)
        names = [(name, observers[group[0]]) for group in groups for name in group]
        forms: dict[str, LinearForm] = {}
        if torch.device(self.device).type != "cpu":
            block = plan.source.blocks.modules[index]
            for group in groups:
                statistics = observers[group[0]].statistics
                forms |= compress_together(block, [rows[name] for name in group], statistics)

        def compress(item: tuple[str, Observer]) -> LayerReport:
            name, observer = item
            return self._in_place(plan, index, rows[name], observer, forms.pop(name, None))

        with closing(self.lanes.map(compress, names)) as layers:
            for (name, _), layer in zip(names, layers, strict=True):
                self._compressed(plan, rows[name], layer)

    def _unreached(self, plan: Plan, index: int, row: LinearPlan, methods: Sequence[str]) -> None:
        note = "calibration text never reached it: all its inputs were taken as alike"
        observer = Observer(methods, row.shape[1], self.device)
        observer.assume_all_alike()
        layer = self._in_place(plan, index, row, observer)
        layer = replace(layer, note="; ".join(filter(None, (layer.note, note))))
        self._compressed(plan, row, layer)

    def _in_place(
        self,
        plan: Plan,
        index: int,
        row: LinearPlan,
        observer: Observer,
        form: LinearForm | None = None,
    ) -> LayerReport:
        """Compress a linear of a loaded block, which computes with the result from now on."""
        linear = plan.source.blocks.modules[index].get_submodule(row.name)
        layer, dense = self._linear(plan, row, weight_of(linear), observer, form)
        set_tensor(linear, "weight", weight_of(linear, dense).contiguous())
        return layer

    def _linear(
        self,
        plan: Plan,
        row: LinearPlan,
        weight: Tensor,
        observer: Observer | None,
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

    def _compressed(self, plan: Plan, row: LinearPlan, layer: LayerReport) -> None:
        self.layers.append(layer)
        self._done += row.shape[0] * row.shape[1]
        self.report(self._done / plan.weights, row.module)

    def _finish(
        self, plan: Plan, index: int, done: set[str], hidden: tuple[Tensor, ...] = ()
    ) -> None:
        """What stays as it is of block `index`; then the block is done."""
        for row in plan.linears[index]:
            if row.note and not row.steps:
                self.skipped[row.module] = row.note
        for name, full in plan.source.of_block(index).items():
            if name not in done:
                self._pass_through(plan, full)
        self._note_fused(plan, index)
        if self.journal is not None and index + 1 < len(plan.linears):
            layers = [asdict(layer) for layer in self.layers]
            facts = {"layers": layers, "skipped": self.skipped, "kept": self._kept}
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


def _portions(stage: list[list[str]], rows: Mapping[str, LinearPlan]) -> Iterator[list[list[str]]]:
    """The groups of a stage in portions whose statistics fit into memory together."""
    portion: list[list[str]] = []
    taken = 0
    for group in stage:
        need = 4 * rows[group[0]].shape[1] ** 2
        if portion and taken + need > _STATISTICS_BYTES:
            yield portion
            portion, taken = [], 0
        portion.append(group)
        taken += need
    yield portion
