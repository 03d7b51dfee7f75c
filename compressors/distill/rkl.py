"""Distillation on the student's own text by reverse KL: MiniLLM and GKD.

Loss of a position: KL(student ‖ teacher) (MiniLLM, arXiv:2306.08543, eq. 1) as GKD takes it
(arXiv:2306.13649, algorithm 1): summed over the vocabulary, with no gradient through the sampling.
On-policy share (GKD's λ): one half. Every row is made of segments, the first half of each from
the calibration text or the teacher, the second half written by the student; it is written anew
four times in a training.
"""

from __future__ import annotations

from torch import Tensor

from compressors.distill.losses import reverse_kl
from compressors.distill.objective import Objective


def objective() -> Objective:
    """The method as the trainer takes it."""
    return Objective(loss=_loss, generated=131_072, rounds=4)


def _loss(student: Tensor, teacher: Tensor, _words: Tensor) -> Tensor:
    return reverse_kl(student, teacher)
