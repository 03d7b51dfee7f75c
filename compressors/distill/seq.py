"""Black-box distillation: sequence level, Kim & Rush 2016, arXiv:1606.07947.

Loss of a position: −log q(y) of the word that the teacher wrote (section 3.2, L_SEQ-KD), on nothing
but the teacher's text. Where the paper takes the mode of the teacher by beam search, the teacher is
sampled here: a language model without a source has no one best sentence.
"""

from __future__ import annotations

from torch import Tensor

from compressors.distill.losses import cross_entropy
from compressors.distill.objective import Objective


def objective() -> Objective:
    """The method as the trainer takes it."""
    return Objective(loss=_loss, white_box=False, text=False, generated=393_216)


def _loss(student: Tensor, _teacher: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(student, words)
