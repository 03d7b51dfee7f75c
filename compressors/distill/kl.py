"""Distillation on the teacher's whole distribution: Hinton et al. 2015, arXiv:1503.02531.

Loss of a position: T² KL(teacher ‖ student) at temperature T = 1 (section 2, soft targets only), on
the calibration text and on text of the teacher's own (LLM-QAT, arXiv:2305.17888, section 3.1),
which teaches as well as more calibration text would. A term for the text's own next word was tried
and gained nothing.
"""

from __future__ import annotations

from torch import Tensor

from compressors.distill.losses import forward_kl
from compressors.distill.objective import Objective

TEMPERATURE = 1.0


def objective() -> Objective:
    """The method as the trainer takes it."""
    return Objective(loss=_loss, generated=262_144)


def _loss(student: Tensor, teacher: Tensor, _words: Tensor) -> Tensor:
    return forward_kl(student, teacher, TEMPERATURE)
