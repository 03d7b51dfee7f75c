"""Bit packing: sub-byte codes ↔ bytes, exact for 2, 3, 4 and 8 bits.

Codes are packed along the last axis, little-endian bit order: code `i` occupies bits
`[i*bits, (i+1)*bits)` of its row. A row of K codes takes `ceil(K*bits/8)` bytes; unused bits are
zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes takes."""
    return math.ceil(columns * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] below 2**bits → uint8 bytes [..., ceil(K*bits/8)].

    Raises:
        ValueError: unsupported width, or a code that does not fit.
    """
    _check(codes, bits)
    if bits == 8:
        return codes.clone()
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code does not fit in {bits} bits")
    width = packed_width(codes.shape[-1], bits)
    per_word, word_bytes = _word(bits)
    words = _split(codes, per_word).int()
    shifts = torch.arange(per_word, device=codes.device, dtype=torch.int32) * bits
    joined = (words << shifts).sum(-1, dtype=torch.int32)
    octets = torch.arange(word_bytes, device=codes.device, dtype=torch.int32) * 8
    packed = ((joined.unsqueeze(-1) >> octets) & 0xFF).to(torch.uint8)
    rows: Tensor = packed.flatten(-2)
    return rows[..., :width].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: uint8 bytes [..., W] → uint8 codes [..., columns].

    Raises:
        ValueError: unsupported width, or W is not what `columns` codes take.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_width(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_width(columns, bits)} bytes, "
            f"not {packed.shape[-1]}"
        )
    if bits == 8:
        return packed.clone()
    per_word, word_bytes = _word(bits)
    octets = _split(packed, word_bytes).int()
    places = torch.arange(word_bytes, device=packed.device, dtype=torch.int32) * 8
    joined = (octets << places).sum(-1, dtype=torch.int32)
    shifts = torch.arange(per_word, device=packed.device, dtype=torch.int32) * bits
    codes = ((joined.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    rows: Tensor = codes.flatten(-2)
    return rows[..., :columns].contiguous()


def _word(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest whole unit: 8 codes in 3 bytes for 3 bits."""
    return (8, 3) if bits == 3 else (8 // bits, 1)


def _split(values: Tensor, unit: int) -> Tensor:
    """[..., L] → [..., ceil(L/unit), unit], filled up with zeros."""
    count = math.ceil(values.shape[-1] / unit)
    padded = torch.nn.functional.pad(values, (0, count * unit - values.shape[-1]))
    return padded.view(*values.shape[:-1], count, unit)


def _check(values: Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, not {bits}")
    if values.dtype != torch.uint8:
        raise ValueError(f"expected uint8, not {values.dtype}")
