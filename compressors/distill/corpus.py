"""The rows a training reads: calibration windows, the teacher's text, the student's own.

Everything is a function of the seed, so that a resumed training reads the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressors.calibration import SEGMENT, generate, sample
from compressors.checkpoint import Checkpoint
from compressors.distill.compute import computing
from compressors.distill.objective import Objective
from compressors.distill.student import Student

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
    kept: Path | None = None,
    progress: Callable[[float], None] = lambda _share: None,
) -> Corpus:
    """What `objective` trains on; `windows` int64 [n, length] is the calibration text.

    The teacher's text is kept in the folder `kept` for other trainings: it takes a fifth of one.
    """
    length = windows.shape[1]
    parts = [windows] if objective.text else []
    if objective.generated:
        count = math.ceil(objective.generated / length)
        # Far from the seeds of the default texts, see `calibration.default_calibration`.
        size = (count, length, seed + 1_000_003)
        make = partial(
            generate,
            checkpoint,
            windows=count,
            length=length,
            seed=size[2],
            device=device,
            progress=progress,
        )
        parts.append(_written(make, _file(checkpoint, size, device, kept), checkpoint))
    rows = torch.cat(parts)
    scored = torch.ones_like(rows, dtype=torch.bool)
    scored[:, -1] = objective.white_box
    if not objective.white_box:
        segment = min(SEGMENT, length)
        scored[:, segment - 1 :: segment] = False
    return Corpus(rows, scored)


def _file(
    checkpoint: Checkpoint,
    size: tuple[int, int, int],
    device: torch.device | str,
    kept: Path | None,
) -> Path | None:
    """Where rows of size (n, length, seed) are kept: they depend on all that is named here."""
    if kept is None:
        return None
    kind = torch.device(device).type
    job = f"{checkpoint.source_digest} {size} {kind} {torch.__version__}"
    return kept / f"written-{blake3(job.encode()).hexdigest()[:32]}.safetensors"


def _written(make: Callable[[], Tensor], file: Path | None, checkpoint: Checkpoint) -> Tensor:
    """Rows that the teacher wrote, int64 [n, length]: those in `file`, or made and kept there."""
    if file is None:
        return make()
    known = _read(file, int(checkpoint.config.get("vocab_size", 0)))
    if known is not None:
        return known
    rows = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({"rows": rows}, temporary, {"digest": blake3(rows.numpy().tobytes()).hexdigest()})
    temporary.replace(file)
    return rows


def _read(file: Path, vocabulary: int) -> Tensor | None:
    """The rows in `file`, or None where there are none or they are not what was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            rows: Tensor = opened.get_tensor("rows")
            digest = (opened.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    if rows.dtype != torch.int64 or rows.ndim != 2 or not rows.numel():
        return None
    if blake3(rows.numpy().tobytes()).hexdigest() != digest:
        return None
    return rows if int(rows.min()) >= 0 and int(rows.max()) < vocabulary else None


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
