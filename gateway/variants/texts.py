"""The token windows a build calibrates and judges on, made once per model and kept in the cache.

Generating text with the model takes longer than compressing with it, so the default windows are
stored as safetensors beside the artifacts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressors.base import CompressionError
from compressors.calibration import Calibration, default_calibration, from_file
from compressors.checkpoint import Checkpoint
from gateway.engine.tokenizer import load_tokenizer
from gateway.quality.text import LENGTH, context_length, held_out
from gateway.variants.spec import BuildSpec

_KEY = "tokens"
# Text that the model must first generate, token after token, is kept to short windows.
_DEFAULT_LENGTH = 256


def calibration_of(spec: BuildSpec, checkpoint: Checkpoint) -> Calibration:
    """The user's calibration file, or the default text.

    Raises:
        CompressionError: the file cannot be used.
    """
    tokenize = load_tokenizer(spec.folder).encode
    length = min(LENGTH, context_length(checkpoint, LENGTH))
    if spec.calibration is not None:
        if blake3(spec.calibration.read_bytes()).hexdigest() != spec.calibration_digest:
            raise CompressionError(f"{spec.calibration} changed since the gateway was started")
        return from_file(spec.calibration, tokenize, length=length)

    def make() -> Tensor:
        short = min(length, _DEFAULT_LENGTH)
        return default_calibration(checkpoint, tokenize, length=short, seed=spec.seed).tokens

    return Calibration(_kept(spec, checkpoint, "calibration", make), "default text")


def evaluation_windows(spec: BuildSpec, checkpoint: Checkpoint) -> Tensor:
    """Held-out windows, int64 [n, length]: the same for every level of the model.

    Raises:
        CompressionError: the user's file cannot be used.
    """
    tokenize = load_tokenizer(spec.folder).encode

    def make() -> Tensor:
        length = LENGTH if spec.eval_text is not None else _DEFAULT_LENGTH
        return held_out(
            checkpoint, tokenize, eval_text=spec.eval_text, length=length, seed=spec.seed
        ).tokens

    if spec.eval_text is not None:
        return make()
    return _kept(spec, checkpoint, "evaluation", make)


def _kept(spec: BuildSpec, checkpoint: Checkpoint, what: str, make: Callable[[], Tensor]) -> Tensor:
    folder = spec.cache_dir / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{spec.source_digest[:32]}-{what}-{spec.seed}.safetensors"
    known = _read(file, int(checkpoint.config.get("vocab_size", 2**31)))
    if known is not None:
        return known
    tokens = make()
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({_KEY: tokens}, temporary)
    temporary.replace(file)
    return tokens


def _read(file: Path, vocabulary: int) -> Tensor | None:
    """Stored windows, or None when there are none or they are not what we write."""
    if not file.exists():
        return None
    try:
        tokens = load_file(file).get(_KEY)
    except (SafetensorError, OSError):
        return None
    if tokens is None or tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
        return None
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        return None
    return tokens
