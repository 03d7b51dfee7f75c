"""A recipe with a step that trains: what stands before it, the training, what comes after it.

The part of the recipe before the step runs through the ordinary pipeline into memory; that is the
student. The dense model is the teacher: it is read block by block (`teacher`), never held whole. In
memory at once: the student in float32 with two moments and a gradient for what it trains (16 bytes
a weight), its forms, the teacher's last hidden states of the rows trained on, and one batch of
logits of both. Steps that come after run from a temporary checkpoint of the trained student.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import Tensor

from compressors.base import CompressionError, LayerReport, ProgressFn, Report, Sink
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.distill.corpus import make_corpus
from compressors.distill.objective import Objective
from compressors.distill.state import TrainingState
from compressors.distill.student import MakeTrained, Student
from compressors.distill.teacher import Teacher
from compressors.distill.train import Pace, Training
from compressors.distill.trainable import TrainedWeight, moved, trained
from compressors.memory import MemorySink
from compressors.plan import check_calibration, open_source
from compressors.quantize.qat import FakeQuantized
from compressors.recipe import Recipe
from compressors.registry import METHODS
from compressors.step import Step
from compressors.tensor import Grouped, LinearForm

if TYPE_CHECKING:
    from compressors.pipeline import Host

ROW = 256  # longest row trained on: attention over longer ones costs more than it teaches
# Codes of so few bits are trained with their grids; of more bits, the grids alone.
_TRAINED_BITS = 3
# Shares of the progress: what stands before the training, its text, the training (rest: after).
_BEFORE, _TEXT, _TRAINED = 0.1, 0.25, 0.9


def training_step(recipe: Recipe) -> int | None:
    """Number of the recipe's step that trains the model, if it has one."""
    trains = (i for i, step in enumerate(recipe.steps) if METHODS[step.method].trains)
    return next(trains, None)


def distill(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    sink: Sink,
    calibration: Calibration | None,
    progress: ProgressFn | None,
    seed: int,
    host: Host,
) -> Report:
    """`pipeline.compress` of a recipe with a training step; arguments and errors as there."""
    job = _Job(checkpoint, recipe, calibration=calibration, progress=progress, seed=seed, host=host)
    before = job.before()
    student, seconds = job.train(before)
    report = job.report(before, seconds)
    if not job.after:
        student.write(sink)
        job.say(1.0, "written")
    else:
        report = job.finish(student, sink, report)
    if job.state is not None:
        job.state.clear()
    return report


class _Before:
    """What the steps before the training made, and the weights that quantization started from."""

    def __init__(self, sink: MemorySink, report: Report, dense: MemorySink | None) -> None:
        self.sink, self.report, self.dense = sink, report, dense


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        *,
        calibration: Calibration | None,
        progress: ProgressFn | None,
        seed: int,
        host: Host,
    ) -> None:
        index = training_step(recipe)
        assert index is not None
        self.step, self.after = recipe.steps[index], recipe.steps[index + 1 :]
        self.first = recipe.steps[:index]
        if self.step.kind == "quantize":  # it starts from what GPTQ makes of the weight
            self.first += (replace(self.step, method="gptq"),)
        self._checkpoint, self._recipe, self._seed = checkpoint, recipe, seed
        self._calibration, self._progress = calibration, progress
        self._host = replace(host, journal=None, scratch=None)
        self.windows = self._windows()
        self.state = None
        if host.scratch is not None:
            self.state = TrainingState(host.scratch, self._identity())

    def say(self, share: float, what: str) -> None:
        if self._progress:
            self._progress(share, what)

    def before(self) -> _Before:
        """Run the steps before the training."""
        sink = MemorySink()
        report = self._compress(self.first, sink)
        codes = [s for s in self.first if s.kind == "quantize" and s.bits <= _TRAINED_BITS]
        plain = tuple(s for s in self.first if s.kind in ("depth", "width"))
        if not codes or len(plain) + 1 != len(self.first):
            return _Before(sink, report, None)
        dense = MemorySink()
        self._compress(plain, dense)
        return _Before(sink, report, dense)

    def train(self, before: _Before) -> tuple[Student, float]:
        """The trained student, and the seconds that it took."""
        began = time.perf_counter()
        objective: Objective = METHODS[self.step.method].load()()
        device = self._host.device
        student = Student(before.sink, make=_maker(before), device=device)

        def writes(share: float) -> None:
            self.say(_BEFORE + (_TEXT - _BEFORE) * share, f"the teacher writes: {share:.0%}")

        writes(0.0)
        corpus = make_corpus(
            objective,
            self._checkpoint,
            self.windows,
            seed=self._seed,
            device=device,
            kept=self._host.texts,
            progress=writes,
        )
        training = Training(
            student,
            Teacher(self._checkpoint, device=device),
            corpus,
            objective,
            Pace(),
            seed=self._seed,
            state=self.state,
        )
        training.run(lambda share, what: self.say(_TEXT + (_TRAINED - _TEXT) * share, what))
        return student, round(time.perf_counter() - began, 3)

    def report(self, before: _Before, seconds: float) -> Report:
        """What was done so far, with the errors that the training found."""
        note = f"then trained by {self.step.name}"
        layers = tuple(_noted(layer, note) for layer in before.report.layers)
        return Report(
            self._recipe.name,
            layers,
            before.report.skipped,
            {**before.report.seconds, "train": seconds},
            self.windows.numel(),
        )

    def finish(self, student: Student, sink: Sink, report: Report) -> Report:
        """Do the steps after the training, from a checkpoint of the student."""
        trained_sink = MemorySink()
        student.write(trained_sink)
        with tempfile.TemporaryDirectory(prefix="student-") as folder:
            checkpoint = _save(trained_sink, student, Path(folder))
            target = _Overlay(sink, trained_sink.linears)
            rest = self._run(
                checkpoint,
                self.after,
                target,
                lambda share, what: self.say(_TRAINED + (1 - _TRAINED) * share, what),
            )
        layers = rest.layers or report.layers
        seconds = {**report.seconds, **{f"then {k}": v for k, v in rest.seconds.items()}}
        skipped = report.skipped | rest.skipped
        return replace(report, layers=layers, skipped=skipped, seconds=seconds)

    def _compress(self, steps: tuple[Step, ...], sink: Sink) -> Report:
        return self._run(
            self._checkpoint, steps, sink, lambda share, what: self.say(_BEFORE * share, what)
        )

    def _run(
        self, checkpoint: Checkpoint, steps: tuple[Step, ...], sink: Sink, progress: ProgressFn
    ) -> Report:
        from compressors.pipeline import compress

        return compress(
            checkpoint,
            Recipe(steps),
            sink=sink,
            calibration=self._calibration,
            progress=progress,
            seed=self._seed,
            host=self._host,
        )

    def _windows(self) -> Tensor:
        """Calibration text in rows to train on, int64 [n, length]."""
        if self._calibration is None:
            raise CompressionError(f"{self._recipe.name} needs calibration text and none was given")
        windows = check_calibration(open_source(self._checkpoint), self._calibration)
        length = min(ROW, windows.shape[1])
        whole = windows.shape[1] // length * length
        return windows[:, :whole].reshape(-1, length)

    def _identity(self) -> str:
        """Which training this is: a state of another must not be taken up."""
        facts = {
            "recipe": self._recipe.name,
            "source": self._checkpoint.source_digest,
            "text": self._calibration.digest if self._calibration else "",
            "seed": self._seed,
            "pace": str(Pace()),
            "objective": str(METHODS[self.step.method].load()().tokens),
            "torch": str(torch.__version__),
        }
        return blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _maker(before: _Before) -> MakeTrained:
    def make(module: str, transposed: bool, form: LinearForm) -> TrainedWeight:
        if before.dense is None or not isinstance(form, Grouped) or form.bits > _TRAINED_BITS:
            return trained(form)
        weight = before.dense.tensors[f"{module}.weight"]
        return FakeQuantized(weight.t() if transposed else weight, form)

    return make


def _noted(layer: LayerReport, note: str) -> LayerReport:
    return replace(layer, note="; ".join(filter(None, (layer.note, note))))


def _save(sink: MemorySink, student: Student, folder: Path) -> Checkpoint:
    """The student as a dense checkpoint in `folder`; factored weights in float32, unrounded."""
    tensors = dict(sink.tensors)
    for name, form in sink.linears.items():
        dense = form.dense()
        tensors[f"{name}.weight"] = dense.t() if name in student.transposed else dense
    (folder / "config.json").write_text(json.dumps(sink.model_config), encoding="utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.forms = {n: moved(form, student.device) for n, form in sink.linears.items()}
    return checkpoint


class _Overlay:
    """A sink that gets the trained forms where the steps after have left them as they are."""

    def __init__(self, sink: Sink, forms: Mapping[str, LinearForm]) -> None:
        self._sink, self._forms = sink, forms

    def config(self, config: dict[str, Any]) -> None:
        """See `base.Sink`."""
        self._sink.config(config)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """See `base.Sink`."""
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self._forms:
            self._sink.linear(module, self._forms[module])
        else:
            self._sink.tensor(name, tensor)

    def linear(self, module: str, form: LinearForm) -> None:
        """See `base.Sink`."""
        self._sink.linear(module, form)
