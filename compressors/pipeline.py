"""A whole compression job: from a checkpoint, through a recipe, into a sink.

Block by block from the mapped file: one block's weights are materialised, compressed in the order
in which the block uses them, each on the inputs that the already-compressed part before it gives,
written to the sink and let go. The dense model is never held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compressors.apply import compress_linear
from compressors.base import CompressionError, LayerReport, ProgressFn, Report, Sink
from compressors.calibration import Calibration
from compressors.model import Checkpoint, set_tensor, torch_dtype, weight_of
from compressors.plan import (
    LinearPlan,
    Plan,
    blocks_kept,
    check_calibration,
    keep_blocks,
    make_plan,
    open_source,
)
from compressors.probe import DepthProbe
from compressors.recipe import Recipe
from compressors.registry import METHODS
from compressors.tensor import LinearForm
from compressors.walk import Source, Walk

_SAMPLE_ROWS = 256  # inputs of each layer on which its error is reported
_DEPTH_SHARE = 0.3  # of the progress, when blocks are chosen first


def compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    sink: Sink,
    calibration: Calibration | None = None,
    progress: ProgressFn | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Report:
    """Compress the model into `sink`; equal arguments give equal bytes.

    The job is checked whole (architecture, shapes, calibration) before anything is written. Tensors
    that are not compressed reach the sink with the checkpoint's own bytes, except that a dense
    recipe casts to its dtype.

    Raises:
        CompressionError: the job cannot be done; the message names the layer or setting at fault.
    """
    alone = next((step for step in recipe.steps if METHODS[step.method].whole_model), None)
    if alone is not None:
        windows = _windows(open_source(checkpoint), recipe, calibration)
        solve = METHODS[alone.method].load()
        report: Report = solve(checkpoint, alone, windows, sink, progress=progress, device=device)
        return report
    job = _Job(recipe, sink, progress, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with job.timed("plan"):
            source = open_source(checkpoint)
            windows = _windows(source, recipe, calibration)
            make_plan(source, checkpoint.config, recipe)
        config = checkpoint.config
        if recipe.step("depth") and windows is not None:
            with job.timed("depth"):
                source, config = job.drop_blocks(source, windows)
        plan = make_plan(source, config, recipe)
        with job.timed("write"):
            job.write_outside(plan)
        with job.timed("blocks"):
            job.run(plan, windows)
    tokens = 0 if windows is None else windows.numel()
    return Report(recipe.name, tuple(job.layers), job.skipped, job.seconds, tokens)


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
        self,
        recipe: Recipe,
        sink: Sink,
        progress: ProgressFn | None,
        device: torch.device | str,
    ) -> None:
        self.recipe, self.sink, self.progress, self.device = recipe, sink, progress, device
        self.layers: list[LayerReport] = []
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._cast = torch_dtype(recipe.dtype) if recipe.dtype else None
        self._base, self._done = 0.0, 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)

    def report(self, share: float, what: str) -> None:
        if self.progress:
            self.progress(self._base + (1.0 - self._base) * share, what)

    def drop_blocks(self, source: Source, windows: Tensor) -> tuple[Source, dict[str, Any]]:
        """Choose the blocks to keep by measurement; the smaller model's source and config."""
        step = self.recipe.step("depth")
        assert step is not None
        total = len(source.blocks)
        probe = DepthProbe(source, windows, lambda w: self.report(0.0, w), device=self.device)
        kept = METHODS[step.method].load()(probe, kept=blocks_kept(total, step.percent))
        for index in sorted(set(range(total)) - set(kept)):
            self.skipped[source.blocks.prefix(index)] = "dropped as least important"
        self._base = _DEPTH_SHARE
        return keep_blocks(source, kept)

    def write_outside(self, plan: Plan) -> None:
        """The config and everything that is in no block."""
        config = dict(plan.config)
        if self._cast is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self._cast).removeprefix("torch.")
        self.sink.config(config)
        for name in plan.source.outside():
            self._pass_through(plan, name)

    def run(self, plan: Plan, windows: Tensor | None) -> None:
        """Compress and write every block."""
        methods = [
            step.method
            for step in self.recipe.steps
            if step.kind != "depth" and step.needs_calibration
        ]
        walk = None
        if methods and windows is not None:
            walk = Walk(plan.source, windows, device=self.device)
        for index, linears in enumerate(plan.linears):
            done: set[str] = set()
            for row in linears:
                if row.note and not row.steps:
                    self.skipped[row.module] = row.note
            if walk is not None:
                self._calibrated_block(plan, walk, index, methods, done)
            else:
                for row in linears:
                    if row.steps:
                        self._plain_linear(plan, row)
                        done.add(f"{row.name}.weight")
            prefix = plan.source.blocks.prefix(index)
            for name, full in plan.source.of_block(index).items():
                if name not in done:
                    self._pass_through(plan, full)
            self.report((index + 1) / len(plan.linears), f"{prefix} done")

    def _calibrated_block(
        self, plan: Plan, walk: Walk, index: int, methods: Sequence[str], done: set[str]
    ) -> None:
        block = walk.load(index)
        rows = {row.name: row for row in plan.linears[index] if row.steps}
        groups = walk.input_groups(index, list(rows))
        for group in groups:
            width = rows[group[0]].shape[1]
            observer = _Observer(methods, width, self.device)
            walk.observe(index, group[0], observer)
            for name in group:
                linear = block.get_submodule(name)
                form = self._linear(plan, rows[name], weight_of(linear), observer)
                dense = form.dense(torch.float32).to(self.device)
                transposed = weight_of(linear, dense)
                set_tensor(linear, "weight", transposed.contiguous())
                done.add(f"{name}.weight")
        for name in rows.keys() - {n for group in groups for n in group}:
            self.skipped[rows[name].module] = "calibration text never reached it: left dense"
        walk.advance(index)
        walk.free(index)

    def _plain_linear(self, plan: Plan, row: LinearPlan) -> None:
        module = plan.source.model.get_submodule(row.module)
        stored = plan.source.read(f"{row.module}.weight")
        self._linear(plan, row, weight_of(module, stored).to(self.device), None)

    def _linear(
        self, plan: Plan, row: LinearPlan, weight: Tensor, observer: _Observer | None
    ) -> LinearForm:
        start = time.perf_counter()
        stored = plan.source.read(f"{row.module}.weight")
        weight = weight.float()
        statistics = observer.statistics if observer else {}
        try:
            form = compress_linear(weight, row.steps, statistics, rank=row.rank, dtype=stored.dtype)
        except ValueError as error:
            raise CompressionError(f"{row.module}: {error}") from error
        self.sink.linear(row.module, form)
        self.layers.append(
            LayerReport(
                module=row.module,
                scheme=form.scheme,
                bytes_before=stored.numel() * stored.element_size(),
                bytes_after=form.nbytes,
                relative_error=_relative_error(weight, form, observer),
                seconds=round(time.perf_counter() - start, 4),
                note=row.note,
            )
        )
        self._done += weight.numel()
        self.report(self._done / plan.weights, row.module)
        return form

    def _pass_through(self, plan: Plan, name: str) -> None:
        tensor = plan.source.read(name)
        if self._cast is not None and tensor.is_floating_point():
            tensor = tensor.to(self._cast)
        self.sink.tensor(name, tensor)


class _Observer:
    """Statistics of one input for every method that needs one, and a sample of its rows."""

    def __init__(self, methods: Sequence[str], width: int, device: torch.device | str) -> None:
        modules = {name: METHODS[name].module() for name in methods}
        # Methods that accumulate the same thing share it.
        shared: dict[Any, Any] = {}
        for module in modules.values():
            if module.accumulate not in shared:
                shared[module.accumulate] = module.empty(width, device)
        self._shared = shared
        self.statistics: Mapping[str, Any] = {
            name: shared[module.accumulate] for name, module in modules.items()
        }
        self.sample: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.sample is None:
            self.sample = rows[:: max(1, len(rows) // _SAMPLE_ROWS)][:_SAMPLE_ROWS].float().clone()
        for accumulate, statistic in self._shared.items():
            accumulate(statistic, rows)


def _relative_error(weight: Tensor, form: LinearForm, observer: _Observer | None) -> float:
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ on the sample, or ‖W−Ŵ‖ / ‖W‖ without one."""
    error = weight - form.dense(torch.float32).to(weight.device)
    if observer is not None and observer.sample is not None:
        error, weight = observer.sample @ error.t(), observer.sample @ weight.t()
    norm = float(weight.norm())
    return float(error.norm()) / norm if norm else 0.0
