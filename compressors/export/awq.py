"""AWQ checkpoints (AutoAWQ's GEMM layout), read as canonical forms.

For a layer of N outputs, K inputs and G groups, bits 4, as AutoAWQ, vLLM and transformers read it:

    qweight  int32 [K, N/8]    eight codes of a row per word
    qzeros   int32 [G, N/8]    zero points, packed alike
    scales   float16 [G, N]

so `W[n, k] = scales[k // group, n] * (code[n, k] - zero[k // group, n])`. The i-th four bits of a
word, lowest first, are column `8·word + (0, 2, 4, 6, 1, 3, 5, 7)[i]`. The scaling of inputs that
AWQ (arXiv:2306.00978) searched for is folded into the model's other weights already.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressors.export.names import level_name
from compressors.export.packed import FormatError, PackedCheckpoint, take
from compressors.tensor import Grouped

_BITS, _PER_WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqCheckpoint(PackedCheckpoint):
    """An AutoAWQ folder of version `gemm`.

    Raises (on construction):
        FormatError: another version, other bits, or tensors that the architecture has no place for.
    """

    parts = ("qweight", "qzeros", "scales")
    marker = "qweight"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.group_size = _group_size(self._checkpoint.config.get("quantization_config"), folder)

    @property
    def level(self) -> str:
        return level_name("awq", _BITS, self.group_size)

    def unpack(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Grouped:
        """See `PackedCheckpoint`."""
        n, k = shape
        group = k if self.group_size == -1 else min(self.group_size, k)
        groups = -(-k // group)
        if n % _PER_WORD:
            raise FormatError(f"{n} outputs: the format packs {_PER_WORD} at a time")
        codes = _unpacked(_words(stored, "qweight", k, n))
        zeros = _unpacked(_words(stored, "qzeros", groups, n))
        scales = take(stored, "scales")
        if tuple(scales.shape) != (groups, n) or not scales.is_floating_point():
            raise FormatError(
                f"scales are {scales.dtype} {list(scales.shape)}, not [{groups}, {n}]"
            )
        if not bool(torch.isfinite(scales).all()):
            raise FormatError("scales are not finite")
        return Grouped(
            codes=codes.t().contiguous(),
            scales=scales.t().float().contiguous(),
            zeros=zeros.t().float().contiguous(),
            bits=_BITS,
            group=group,
        )


def _words(stored: dict[str, Tensor], part: str, rows: int, n: int) -> Tensor:
    words = take(stored, part)
    if words.dtype != torch.int32 or tuple(words.shape) != (rows, n // _PER_WORD):
        raise FormatError(
            f"{part} is {words.dtype} {list(words.shape)}, not int32 [{rows}, {n // _PER_WORD}]"
        )
    return words


def _unpacked(words: Tensor) -> Tensor:
    """uint8 [R, 8·W] of int32 [R, W], in column order."""
    rows, width = words.shape
    out = torch.empty(rows, width, _PER_WORD, dtype=torch.uint8)
    for place, column in enumerate(_ORDER):
        out[:, :, column] = (words >> (_BITS * place) & (2**_BITS - 1)).to(torch.uint8)
    return out.reshape(rows, width * _PER_WORD)


def _group_size(settings: object, folder: str | Path) -> int:
    entry: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
    if entry.get("quant_method") != "awq":
        raise FormatError(f"{folder}: config.json has no quantization_config of AWQ's")
    version = str(entry.get("version") or entry.get("format") or "gemm").lower()
    if version != "gemm":
        raise FormatError(f"{folder}: AWQ version {version!r} cannot be read; known: gemm")
    bits = entry.get("bits", entry.get("w_bit", _BITS))
    if bits != _BITS or isinstance(bits, bool):
        raise FormatError(f"{folder}: bits is {bits!r}; AWQ's gemm version has {_BITS}")
    group = entry.get("group_size", entry.get("q_group_size", 128))
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and group < 1):
        raise FormatError(f"{folder}: group_size is {group!r}, not -1 or a positive number")
    return group
