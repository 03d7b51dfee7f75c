"""Held-out windows of token ids: the same ones for every level of a model.

Owns cutting and choosing windows, and reading the operator's own text. Where no text is given, the
caller passes the default of `compressors.calibration`, whose calibration part is kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MAX_TEXT_BYTES = 64 * 2**20
DEFAULT_LENGTH = 512
DEFAULT_COUNT = 48

Tokenize = Callable[[str], Sequence[int]]


class TextError(ValueError):
    """The text cannot be used; the message names the file or what is missing."""


def read_text(path: str | Path) -> str:
    """The operator's evaluation text: UTF-8, at most 64 MiB.

    Raises:
        TextError: no such file, too large, empty, or not UTF-8.
    """
    file = Path(path).expanduser()
    try:
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise TextError(f"{file}: {size} bytes; at most {MAX_TEXT_BYTES} are read")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise TextError(f"{file}: empty")
    return text


def choose_windows(
    ids: Sequence[int] | Tensor,
    *,
    length: int = DEFAULT_LENGTH,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
) -> Tensor:
    """Up to `count` windows of `length` tokens that do not overlap, in text order.

    The text is cut into windows from its start; which of them are taken depends on the seed only,
    so that levels measured on different days are measured on the same tokens. A text shorter than
    one window gives one window of what there is.

    Returns:
        int64 [W, T], 1 ≤ W ≤ count, T = min(length, number of tokens).

    Raises:
        TextError: fewer than two tokens, or settings that allow no window.
    """
    if length < 2 or count < 1:
        raise TextError("a window needs 2 tokens or more, and there must be at least one window")
    tokens = torch.as_tensor(ids, dtype=torch.int64).flatten()
    if tokens.numel() < 2:
        raise TextError("the text has fewer than two tokens")
    length = min(length, tokens.numel())
    available = tokens.numel() // length
    windows = tokens[: available * length].reshape(available, length)
    if available <= count:
        return windows.clone()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:count].sort().values
    return windows[chosen]


def windows_from_file(
    path: str | Path,
    tokenize: Tokenize,
    *,
    length: int = DEFAULT_LENGTH,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
) -> Tensor:
    """`choose_windows` of a text file, as `--eval-text` names it.

    Raises:
        TextError: as `read_text` and `choose_windows`.
    """
    try:
        return choose_windows(tokenize(read_text(path)), length=length, count=count, seed=seed)
    except TextError as error:
        if str(path) in str(error):
            raise
        raise TextError(f"{path}: {error}") from error
