"""Which held-out windows a model's levels are judged on: the same tokens for every level.

The operator's own text where `--eval-text` names one, else the default of
`compressors.calibration`, whose evaluation part is kept apart from what methods calibrate on.
"""

from __future__ import annotations

from pathlib import Path

from compressors.calibration import Calibration, Tokenize, default_evaluation, from_file
from compressors.checkpoint import Checkpoint

LENGTH = 512
WINDOWS = 32
MIN_CONTEXT = 8


def held_out(
    checkpoint: Checkpoint,
    tokenize: Tokenize,
    *,
    eval_text: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
) -> Calibration:
    """Windows to evaluate on, never longer than the model's context; equal arguments, equal tokens.

    Args:
        checkpoint: the dense model; generates half of the default text.
        eval_text: UTF-8 file; windows are spread evenly over it.
        seed: of the default text's generations.

    Raises:
        compressors.base.CompressionError: the file cannot be read or is too short.
    """
    length = min(length, context_length(checkpoint, length))
    if eval_text is not None:
        return from_file(eval_text, tokenize, windows=windows, length=length)
    return default_evaluation(checkpoint, tokenize, windows=windows, length=length, seed=seed)


def context_length(checkpoint: Checkpoint, default: int) -> int:
    """Positions that the model has, by the names that transformers' configs give it."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = checkpoint.config.get(key)
        if isinstance(value, int) and value >= MIN_CONTEXT:
            return value
    return default
