"""A whole compression job: from a checkpoint, through a recipe, into a sink.

Owns the order of a job: check it on shapes, choose what the model loses as a whole (blocks, heads
and channels, ranks), then compress and write block by block from the mapped file (`blocks`). The
dense model is never held.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressors.base import CompressionError, Journal, ProgressFn, Report, Sink
from compressors.blocks import compress_blocks
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.job import Job
from compressors.narrow import narrow, plan_width
from compressors.parallel import Lanes
from compressors.plan import (
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
from compressors.step import Step
from compressors.walk import Source, Walk

_CHOICE_SHARE = 0.3  # of the progress that is left, when blocks, or heads and channels, are chosen


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
    host = host or Host(device)
    if alone := next((step for step in recipe.steps if METHODS[step.method].whole_model), None):
        windows = _windows(open_source(checkpoint), recipe, calibration)
        solve = METHODS[alone.method].load()
        report: Report = solve(
            checkpoint, alone, windows, sink, progress=progress, device=host.device
        )
        return report
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
        torch.manual_seed(seed)
        job = Job(recipe, sink, progress, host.device, host.journal, lanes)
        return _run(job, checkpoint, calibration)


def _run(job: Job, checkpoint: Checkpoint, calibration: Calibration | None) -> Report:
    """Compress layer by layer."""
    with job.timed("plan"):
        source, config = open_source(checkpoint), checkpoint.config
        windows = _windows(source, job.recipe, calibration)
        plan = make_plan(source, config, job.recipe)
        if width := job.recipe.step("width"):
            plan_width(source, config, width.percent)
        start = job.resume()
    if windows is not None:
        plan = _chosen(job, source, config, windows)
    with job.timed("write"):
        job.write_outside(plan)
    with job.timed("blocks"):
        compress_blocks(job, plan, windows, start)
    tokens = 0 if windows is None else windows.numel()
    return Report(job.recipe.name, tuple(job.layers), job.skipped, job.seconds, tokens)


def _chosen(job: Job, source: Source, config: dict[str, Any], windows: Tensor) -> Plan:
    """The plan after every choice that is made by measuring the whole model."""
    if depth := job.recipe.step("depth"):
        with job.timed("depth"):
            source, config = _drop_blocks(job, depth, source, windows)
    if width := job.recipe.step("width"):
        with job.timed("width"):
            source, config = _narrow(job, width, source, config, windows)
    plan = make_plan(source, config, job.recipe)
    if lowrank := job.recipe.step("lowrank"):
        with job.timed("ranks"):
            plan = _share_ranks(job, lowrank, plan, windows)
    return plan


def _drop_blocks(
    job: Job, step: Step, source: Source, windows: Tensor
) -> tuple[Source, dict[str, Any]]:
    """Choose the blocks to keep by measurement; the smaller model's source and config."""
    total = len(source.blocks)
    if job.kept is None:
        probe = DepthProbe(source, windows, lambda w: job.report(0.0, w), device=job.device)
        job.kept = METHODS[step.method].load()(probe, kept=blocks_kept(total, step.percent))
    for index in sorted(set(range(total)) - set(job.kept)):
        job.skipped[source.blocks.prefix(index)] = "dropped as least important"
    job.put_behind(_CHOICE_SHARE)
    return keep_blocks(source, job.kept)


def _narrow(
    job: Job, step: Step, source: Source, config: dict[str, Any], windows: Tensor
) -> tuple[Source, dict[str, Any]]:
    """Choose heads and channels to keep by measurement; the narrower model."""
    cut = plan_width(source, config, step.percent)
    job.skipped |= {part: f"stay whole: {reason}" for part, reason in cut.notes.items()}
    walk = Walk(source, windows, device=job.device, lanes=job.lanes)
    solve = METHODS[step.method].load()
    smaller = narrow(cut, walk, solve, lambda d, w: job.report(d * _CHOICE_SHARE, w))
    job.put_behind(_CHOICE_SHARE)
    return smaller, cut.config


def _share_ranks(job: Job, step: Step, plan: Plan, windows: Tensor) -> Plan:
    """Choose the rank of every linear by measurement."""

    def said(done: float, what: str) -> None:
        job.report(done * _CHOICE_SHARE, what)

    shared = share_ranks(plan, windows, step.percent, said, device=job.device)
    job.put_behind(_CHOICE_SHARE)
    return shared


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
