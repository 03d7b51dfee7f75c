"""The rows a training reads: calibration windows, the teacher's text, the student's own.

Everything is a function of the seed, so that a resumed training reads the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressors.calibration import SEGMENT, generate, sample
from compressors.distill.compute import computing
from compressors.distill.objective import Objective
from compressors.distill.student import Student
from compressors.model import Checkpoint

_AT_ONCE = 256  # segments that the student continues in one batch


@dataclass(frozen=True)
class Corpus:
    """Rows of token ids, int64 [n, length], and which positions count, bool [n, length].

    A position is scored on the token after it: the last of a row never, nor the last of a segment
    where the loss asks for the word that follows and none does.
    """

    rows: Tensor
    scored: Tensor


def make_corpus(
    objective: Objective,
    checkpoint: Checkpoint,
    windows: Tensor,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Corpus:
    """What `objective` trains on; `windows` int64 [n, length] is the calibration text."""
    length = windows.shape[1]
    parts = [windows] if objective.text else []
    if objective.generated:
        count = math.ceil(objective.generated / length)
        # Odd seeds of the default texts are taken: see `calibration.default_calibration`.
        parts.append(
            generate(checkpoint, windows=count, length=length, seed=seed + 1_000_003, device=device)
        )
    rows = torch.cat(parts)
    scored = torch.ones_like(rows, dtype=torch.bool)
    scored[:, -1] = objective.white_box
    if not objective.white_box:
        segment = min(SEGMENT, length)
        scored[:, segment - 1 :: segment] = False
    return Corpus(rows, scored)


@torch.no_grad()
def own_text(student: Student, rows: Tensor, *, seed: int) -> Tensor:
    """The rows with the second half of every segment written by the student, int64 [n, length]."""
    segment = min(SEGMENT, rows.shape[1])
    whole = rows.shape[1] // segment * segment
    pieces = rows[:, :whole].reshape(-1, segment)
    generator = torch.Generator(student.device).manual_seed(seed)
    parts = []
    with computing(student.device):
        for batch in pieces.split(_AT_ONCE):  # type: ignore[no-untyped-call]
            prompt = batch[:, : segment // 2].to(student.device)
            parts.append(sample(student.model, prompt, segment, generator).cpu())
    return torch.cat(parts).view(len(rows), whole)
