"""What a distillation method asks for: a loss, and the text that it is taken on. No computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student logits [R, V], teacher logits [R, V], next tokens int64 [R]) → loss per position [R].

Where the method is black-box the teacher's logits are an empty tensor."""


@dataclass(frozen=True)
class Objective:
    """One method.

    Attributes:
        loss: per position.
        white_box: the teacher's logits are needed, not just its text.
        text: the calibration windows are among the rows trained on.
        generated: tokens that the teacher writes for training, at least a row.
        rounds: how often the student's own text is renewed; with zero it writes none, else every
            row is made of segments whose second half the student has written itself.
        tokens: trained on in all; rows are seen again as often as it takes.
    """

    loss: Loss
    white_box: bool = True
    text: bool = True
    generated: int = 0
    rounds: int = 0
    tokens: int = 400_000
