"""The decoder blocks of a job, one after the other: linears alone, or on what text shows of them.

Owns the order of the work and what is computed side by side; what is done to a linear is the
plan's, and how it is written the job's. With text a block's weights are materialised, compressed in
the order in which the block uses them, each on the inputs that the already-compressed part before
it gives, and let go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from compressors.base import LayerReport, Milestone
from compressors.job import Job
from compressors.model import set_tensor, weight_of
from compressors.observe import Observer
from compressors.plan import NO_LINEARS, LinearPlan, Plan
from compressors.recipe import Recipe
from compressors.tensor import LinearForm
from compressors.together import compress_together
from compressors.walk import Walk

_STATISTICS_BYTES = 512 * 2**20  # of the experts that are observed in one pass, K² floats each


def compress_blocks(job: Job, plan: Plan, windows: Tensor | None, start: Milestone) -> None:
    """Compress and write every block from `start` on.

    Args:
        windows: calibration tokens int64 [n, length], where the recipe needs them.
    """
    job.skip_done(plan, start)
    methods = _observing(job.recipe)
    if methods and windows is not None:
        _Calibrated(job, plan, windows, methods).run(start)
    else:
        _plain(job, plan, start)


def _observing(recipe: Recipe) -> list[str]:
    """The methods that want to see the inputs of linears."""
    methods = [
        step.method
        for step in recipe.steps
        if step.kind not in NO_LINEARS and step.needs_calibration
    ]
    if methods and (step := recipe.step("correct")):
        methods.append(step.method)
    return methods


def _plain(job: Job, plan: Plan, start: Milestone) -> None:
    """Every linear by itself, whatever block it is of."""

    def compress(row: LinearPlan) -> LayerReport:
        module = plan.source.model.get_submodule(row.module)
        stored = weight_of(module, plan.source.read(f"{row.module}.weight"))
        return job.linear(plan, row, stored.to(job.device))[0]

    left = plan.linears[start.blocks :]
    jobs = (row for rows in left for row in rows if row.steps)
    with closing(job.lanes.map(compress, jobs)) as layers:
        for index, rows in enumerate(left, start.blocks):
            for row in rows:
                if row.steps:
                    job.compressed(plan, row, next(layers))
            job.finish_block(plan, index, {f"{row.name}.weight" for row in rows if row.steps})


class _Calibrated:
    """Block by block, each on what the compressed blocks before it give."""

    def __init__(self, job: Job, plan: Plan, windows: Tensor, methods: Sequence[str]) -> None:
        self._job, self._plan, self._methods = job, plan, methods
        self._walk = Walk(plan.source, windows, device=job.device, lanes=job.lanes)

    def run(self, start: Milestone) -> None:
        """Compress and write every block from `start` on."""
        walk, plan = self._walk, self._plan
        if start.blocks:
            walk.hidden = [hidden.to(self._job.device) for hidden in start.hidden]
        for index in range(start.blocks, len(plan.linears)):
            walk.load(index)
            rows = {row.name: row for row in plan.linears[index] if row.steps}
            left = set(rows)
            for stage in walk.stages(index, list(rows)):
                for groups in _portions(stage, rows):
                    self._observed(index, groups)
                left -= {name for group in stage for name in group}
            for name in sorted(left, key=list(rows).index):
                self._unreached(index, rows[name])
            walk.advance(index)
            walk.free(index)
            done = {f"{name}.weight" for name in rows}
            self._job.finish_block(plan, index, done, tuple(walk.hidden))

    def _observed(self, index: int, groups: list[list[str]]) -> None:
        """Compress linears of block `index` on what one pass over the text shows them."""
        rows = {row.name: row for row in self._plan.linears[index]}
        observers = {group[0]: self._observer(rows[group[0]]) for group in groups}
        for seen in self._walk.inputs(index, list(observers)):
            for name, x in seen.items():
                observers[name](x)
        names = [(name, observers[group[0]]) for group in groups for name in group]
        forms: dict[str, LinearForm] = {}
        if torch.device(self._job.device).type != "cpu":
            block = self._plan.source.blocks.modules[index]
            for group in groups:
                statistics = observers[group[0]].statistics
                forms |= compress_together(block, [rows[name] for name in group], statistics)

        def compress(item: tuple[str, Observer]) -> LayerReport:
            name, observer = item
            return self._in_place(index, rows[name], observer, forms.pop(name, None))

        with closing(self._job.lanes.map(compress, names)) as layers:
            for (name, _), layer in zip(names, layers, strict=True):
                self._job.compressed(self._plan, rows[name], layer)

    def _unreached(self, index: int, row: LinearPlan) -> None:
        note = "calibration text never reached it: all its inputs were taken as alike"
        observer = self._observer(row)
        observer.assume_all_alike()
        layer = self._in_place(index, row, observer)
        layer = replace(layer, note="; ".join(filter(None, (layer.note, note))))
        self._job.compressed(self._plan, row, layer)

    def _observer(self, row: LinearPlan) -> Observer:
        return Observer(self._methods, row.shape[1], self._job.device)

    def _in_place(
        self, index: int, row: LinearPlan, observer: Observer, form: LinearForm | None = None
    ) -> LayerReport:
        """Compress a linear of a loaded block, which computes with the result from now on."""
        linear = self._plan.source.blocks.modules[index].get_submodule(row.name)
        layer, dense = self._job.linear(self._plan, row, weight_of(linear), observer, form)
        set_tensor(linear, "weight", weight_of(linear, dense).contiguous())
        return layer


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
