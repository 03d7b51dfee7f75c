"""AutoGPTQ's tensors of one linear layer, to and from the canonical `Grouped` form.

Pure tensors: no files, no configs (those are `writer` and `reader`). The format, as AutoGPTQ 0.7.1,
GPTQModel, transformers and vLLM read it, for a layer of N outputs, K inputs and G groups:

    qweight  int32 [K*bits/32, N]   codes packed along K, lowest bits first
    qzeros   int32 [G, N*bits/32]   zero points packed along N
    scales   float16 [G, N]
    g_idx    int32 [K]              group of every input column

so `W[n, k] = scales[g_idx[k], n] * (code[n, k] - zero[g_idx[k], n])`. Codes form one little-endian
bit stream; with 3 bits a code may straddle two words (32 codes in 3 words).

The first version of the format (`checkpoint_format: gptq`) stores `zero - 1`; `gptq_v2` stores
`zero`. A zero point of 0 wraps round to the largest code in version 1: AutoGPTQ's own CPU path
wraps it back, some kernels do not, so writing it is refused and `gptq_v2` is to be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd
from typing import Literal, get_args

import torch
from torch import Tensor

from compressors.export.packed import FormatError
from compressors.tensor import Grouped

Version = Literal["gptq", "gptq_v2"]
VERSIONS: tuple[str, ...] = get_args(Version)
BITS = (2, 3, 4, 8)
WORD = 32


class GptqFormatError(FormatError):
    """A tensor does not fit the format; the message names it."""


@dataclass(frozen=True, eq=False)
class GptqTensors:
    """What a checkpoint holds for one linear layer (layouts in the module's docstring).

    `g_idx` is None where a checkpoint leaves it out: columns are then grouped in their order.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [R, L] along L into int32 words [R, L*bits/32].

    Raises:
        GptqFormatError: L codes do not fill whole words.
    """
    rows, length = codes.shape
    per, words = _period(bits)
    if length % per:
        raise GptqFormatError(f"{length} codes of {bits} bits do not fill whole 32-bit words")
    blocks = codes.reshape(rows, length // per, per)
    out = torch.zeros(rows, length // per, words, dtype=torch.int32, device=codes.device)
    for i in range(per):
        word, offset = divmod(i * bits, WORD)
        code = blocks[:, :, i].to(torch.int32)
        out[:, :, word] |= code << offset
        if offset + bits > WORD:
            out[:, :, word + 1] |= code >> (WORD - offset)
    return out.reshape(rows, -1)


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_words`: int32 [R, W] → uint8 [R, W*32/bits].

    Raises:
        GptqFormatError: W words do not hold whole codes.
    """
    rows, width = packed.shape
    per, words = _period(bits)
    if width % words:
        raise GptqFormatError(f"{width} 32-bit words do not hold whole codes of {bits} bits")
    blocks = packed.reshape(rows, width // words, words)
    out = torch.empty(rows, width // words, per, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for i in range(per):
        word, offset = divmod(i * bits, WORD)
        code = blocks[:, :, word] >> offset
        if offset + bits > WORD:
            low = WORD - offset
            # `>>` on int32 drags the sign along: keep only the bits that belong to this code.
            code = (code & (2**low - 1)) | (blocks[:, :, word + 1] << low)
        out[:, :, i] = (code & mask).to(torch.uint8)
    return out.reshape(rows, -1)


def to_gptq(form: Grouped, version: Version = "gptq") -> GptqTensors:
    """The format's tensors for a form: codes and zero points exact, scales rounded to float16.

    Raises:
        GptqFormatError: bits other than 2, 3, 4, 8; N or K not a multiple of 32; zero points that
            are fractional, outside 0..2**bits-1, or 0 in version 1; scales beyond float16.
    """
    n, k = form.shape
    if form.bits not in BITS:
        raise GptqFormatError(f"{form.bits} bits: the format has {', '.join(map(str, BITS))}")
    if n % WORD or k % WORD:
        raise GptqFormatError(f"shape {n}x{k}: both sides must be multiples of {WORD}")
    zeros = form.zeros.round()
    if not torch.equal(zeros, form.zeros):
        raise GptqFormatError("zero points are fractional; the format holds whole numbers")
    top = 2**form.bits - 1
    lowest = 1 if version == "gptq" else 0
    if zeros.min() < lowest or zeros.max() > top:
        raise GptqFormatError(f"zero points outside {lowest}..{top} cannot be held by '{version}'")
    scales = form.scales.to(torch.float16)
    if not torch.isfinite(scales).all():
        raise GptqFormatError("scales do not fit float16")
    return GptqTensors(
        qweight=pack_words(form.codes, form.bits).t().contiguous(),
        qzeros=pack_words((zeros - lowest).to(torch.uint8).t(), form.bits),
        scales=scales.t().contiguous(),
        g_idx=form.group_index().to(torch.int32),
    )


def from_gptq(
    tensors: GptqTensors, bits: int, group_size: int, version: Version = "gptq"
) -> Grouped:
    """The canonical form of a checkpoint's tensors. Scales become float32, nothing is rounded.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns per group; -1 for per-channel.
        version: what `qzeros` means (module docstring).

    Raises:
        GptqFormatError: dtypes or shapes that do not belong together, or groups out of range.
    """
    if bits not in BITS:
        raise GptqFormatError(f"{bits} bits: the format has {', '.join(map(str, BITS))}")
    _check_dtypes(tensors)
    codes = unpack_words(tensors.qweight.t(), bits)
    n, k = codes.shape
    group = k if group_size == -1 else group_size
    if group < 1:
        raise GptqFormatError(f"group_size {group_size} is neither -1 nor positive")
    groups = ceil(k / group)
    if tuple(tensors.scales.shape) != (groups, n):
        raise GptqFormatError(
            f"scales are {list(tensors.scales.shape)}, expected [{groups}, {n}]"
            f" for {k} columns in groups of {group}"
        )
    if tuple(tensors.qzeros.shape) != (groups, n * bits // WORD):
        raise GptqFormatError(
            f"qzeros are {list(tensors.qzeros.shape)}, expected [{groups}, {n * bits // WORD}]"
        )
    scales = tensors.scales.to(torch.float32)
    if not torch.isfinite(scales).all():
        raise GptqFormatError("scales are not finite")
    stored = unpack_words(tensors.qzeros, bits).to(torch.int16)
    zeros = (stored + 1) & (2**bits - 1) if version == "gptq" else stored
    return Grouped(
        codes=codes.contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros.t().to(torch.float32).contiguous(),
        bits=bits,
        group=min(group, k),
        perm=_activation_order(tensors.g_idx, k, group, groups),
    )


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which packing starts again at a word's lowest bit."""
    shared = gcd(bits, WORD)
    return WORD // shared, bits // shared


def _check_dtypes(tensors: GptqTensors) -> None:
    for name in ("qweight", "qzeros"):
        packed: Tensor = getattr(tensors, name)
        if packed.dtype != torch.int32 or packed.ndim != 2:
            raise GptqFormatError(
                f"{name} is {packed.dtype} {list(packed.shape)}, expected a matrix of int32"
            )
    if not tensors.scales.is_floating_point() or tensors.scales.ndim != 2:
        raise GptqFormatError(f"scales are {tensors.scales.dtype} {list(tensors.scales.shape)}")


def _activation_order(g_idx: Tensor | None, k: int, group: int, groups: int) -> Tensor | None:
    """The form's `perm`, or None when the columns are grouped in their order.

    Some old checkpoints carry zeros as a stand-in for "no activation order"; with more than one
    group that cannot be an order, as no group may be empty.
    """
    if g_idx is None:
        return None
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (k,):
        raise GptqFormatError(
            f"g_idx is {g_idx.dtype} {list(g_idx.shape)}, expected [{k}] of int32"
        )
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise GptqFormatError(f"g_idx names groups outside 0..{groups - 1}")
    in_order = torch.arange(k, device=g_idx.device) // group
    if torch.equal(g_idx.long(), in_order) or not bool(g_idx.any()):
        return None
    return g_idx.to(torch.int32)
