"""What the Triton kernels are told: a packed weight, and how a program shares out its work.

The tables are measured on an H200 in CUDA graphs over weights larger than its cache. Torch only:
the kernels themselves are imported where Triton is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Groups of 32 rows: about one, up to three, many per multiprocessor.
_SMALL, _MIDDLE, _LARGE = 132, 400, 2000


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight in planes of packed fields.

    Attributes:
        planes: uint8 [blocks, units, 64] each, `widths` bits (8, 4, 2 or 1) a field; a code is the
            sum of the fields times the `factors`.
        scales: float16 [blocks, G, 16], times `scale`.
        zeros: [blocks, G, 16] of any type, or None; a zero point is `zero_factor` times it plus
            `offset`, in units of the code.
        width: stored columns of a group.
        n, k: rows and stored columns that count.
    """

    planes: tuple[Tensor, ...]
    widths: tuple[int, ...]
    factors: tuple[int, ...]
    scales: Tensor
    zeros: Tensor | None
    scale: float
    zero_factor: int
    offset: float
    width: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program computes.

    Attributes:
        warps: they share out the columns.
        chunk: columns a warp takes at once.
        blocks: groups of 32 rows of packed codes, or of 16 rows of bytes.
        tokens: groups of 8 tokens.
        ahead: load the next chunk before computing this one; costs registers.
    """

    warps: int
    chunk: int
    blocks: int
    tokens: int
    ahead: bool


@dataclass(frozen=True, slots=True)
class DigitTiling:
    """How a program multiplies one token in digits.

    Attributes:
        warps: they share out the columns.
        pieces: chunks that a warp takes at once.
        chunk: columns of a chunk.
        blocks: groups of 32 rows.
    """

    warps: int
    pieces: int
    chunk: int
    blocks: int


def packed_tiling(codes: Codes, rows: int) -> Tiling | None:
    """The measured choice for `rows` tokens; None: groups too narrow for the kernel's loads."""
    finest = max(32 * max(1, 4 // width) for width in codes.widths)
    size = _size(codes.n)
    if sum(codes.widths) <= 4 and len(codes.widths) == 1:
        wanted = _FOUR[_tokens(rows)][size]
    else:
        wanted = _EIGHT[_tokens(rows)][size]
    chunk = next((c for c in (128, 64, 32) if c <= wanted.chunk and not codes.width % c), None)
    if chunk is None or chunk < finest:
        chunk = finest if not codes.width % finest else None
    if chunk is None or codes.k % 8:
        return None
    ahead = wanted.ahead and finest == 32
    warps = _warps(wanted.warps, codes.scales.shape[1] * codes.width // chunk)
    return Tiling(warps, chunk, wanted.blocks, wanted.tokens, ahead)


def digit_group(codes: Codes) -> int:
    """Columns of a group of digits for one token; 0: the layout does not allow that kernel."""
    if codes.scales.shape[1] * codes.width != codes.k:
        return 0
    finest = max(32 * max(1, 4 // width) for width in codes.widths)
    return next((g for g in (128, 64, 32) if g >= finest and not codes.width % g), 0)


def digit_tiling(codes: Codes) -> DigitTiling:
    """The measured choice for one token of a weight with a `digit_group`."""
    table = _FOUR_DIGITS if sum(codes.widths) <= 4 else _EIGHT_DIGITS
    size = _size(codes.n) + 1 if codes.n > _SMALL * 32 or codes.k > 2 * codes.n else 0
    if -(-codes.n // 32) > _LARGE:
        size += 1
    return _fitted(codes, table[size])


def _fitted(codes: Codes, wanted: DigitTiling) -> DigitTiling:
    chunk = digit_group(codes)
    centred = codes.zeros is None and codes.offset == 128.0 and codes.widths == (8,)
    if centred and wanted.chunk < chunk:  # else a chunk must be a group, for its sum
        chunk = wanted.chunk
    chunks, pieces = codes.k // chunk, wanted.pieces
    warps = _warps(wanted.warps, chunks)
    while pieces > 1 and warps * pieces > chunks:
        pieces //= 2
    return DigitTiling(warps, pieces, chunk, wanted.blocks)


def bytes_tiling(n: int, k: int, rows: int) -> Tiling | None:
    """The measured choice for byte weights [n, k]; None: k is no multiple of 16."""
    if k % 16:
        return None
    wanted = _BYTES[_tokens(rows)][_size(n)]
    warps = _warps(wanted.warps, -(-k // wanted.chunk))
    return Tiling(warps, wanted.chunk, wanted.blocks, wanted.tokens, False)


def is_large(n: int) -> bool:
    """Whether a layer of n rows fills the device several times over."""
    return _size(n) == 2


def _size(n: int) -> int:
    tiles = -(-n // 32)
    return 0 if tiles <= _SMALL else 1 if tiles <= _MIDDLE else 2


def _tokens(rows: int) -> int:
    return 1 if rows <= 8 else 2 if rows <= 16 else 4


def _warps(wanted: int, chunks: int) -> int:
    """At most one warp per chunk."""
    while wanted > max(1, chunks):
        wanted //= 2
    return wanted


# Groups of 8 tokens → by size of the layer.
_FOUR: dict[int, tuple[Tiling, Tiling, Tiling]] = {
    1: (Tiling(16, 128, 1, 1, True), Tiling(8, 128, 1, 1, True), Tiling(4, 128, 1, 1, True)),
    2: (Tiling(16, 64, 1, 2, True), Tiling(8, 128, 1, 2, False), Tiling(4, 128, 1, 2, False)),
    4: (Tiling(8, 128, 1, 4, False), Tiling(8, 64, 2, 4, False), Tiling(4, 64, 2, 4, False)),
}
_EIGHT: dict[int, tuple[Tiling, Tiling, Tiling]] = {
    1: (Tiling(16, 64, 1, 1, True), Tiling(8, 64, 1, 1, True), Tiling(4, 64, 1, 1, False)),
    2: (Tiling(16, 64, 1, 2, False), Tiling(8, 64, 1, 2, False), Tiling(8, 64, 1, 2, False)),
    4: (Tiling(8, 128, 1, 4, False), Tiling(4, 128, 1, 4, False), Tiling(4, 128, 1, 4, False)),
}
_BYTES: dict[int, tuple[Tiling, Tiling, Tiling]] = {
    1: (Tiling(16, 128, 2, 1, False), Tiling(8, 256, 1, 1, False), Tiling(4, 128, 2, 1, False)),
    2: (Tiling(8, 128, 2, 2, False), Tiling(8, 128, 2, 2, False), Tiling(4, 256, 2, 2, False)),
    4: (Tiling(8, 128, 2, 4, False), Tiling(8, 128, 2, 4, False), Tiling(4, 128, 2, 4, False)),
}
# By size of the layer: few rows, few rows of many columns, more, many, a table's.
_FOUR_DIGITS = (
    DigitTiling(16, 2, 128, 1),
    DigitTiling(16, 2, 128, 1),
    DigitTiling(8, 2, 128, 1),
    DigitTiling(4, 1, 128, 2),
    DigitTiling(4, 1, 128, 1),
)
_EIGHT_DIGITS = (
    DigitTiling(16, 2, 128, 1),
    DigitTiling(16, 2, 128, 1),
    DigitTiling(8, 2, 128, 1),
    DigitTiling(4, 2, 128, 1),
    DigitTiling(4, 2, 128, 1),
)
