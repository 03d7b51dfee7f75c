"""KIVI: keys quantized per channel, values per token (arXiv:2402.02750, section 3).

Keys have a few channels that are large in every token, values have not; so keys of `group`
neighbouring tokens share a scale per channel (the paper's equation 2 grouped along tokens) and
values of one token share a scale per group of channels. With B bits, step s and offset z,

    q = clamp(round(x / s - u z), 0, 2**B - 1),    x' = s (q + u z),    u = 2**(B - 4)    (eq. 1)

Deviations, to let scales cost one byte and not four: s is the smallest of 256 steps 2**(1/8) apart
that spans the group, and z a signed byte, in units of one code at 4 bits and of 16 at 8 bits. A
group far off zero for its range (more than eight times) gets a wider step than it would need.

A key group is only quantized when it is complete. Until then its keys (KIVI's residual) are held
at 8 bits per token, in groups of channels: a token's bytes then depend on that token alone, and
the final codes on the group alone, not on when or in which batch they were computed.

Pure tensors: float32 in, bytes out and back; where the bytes lie is the engine's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compressors.kv_scheme import (
    TAIL_BITS,
    TAIL_CHANNELS,
    VALUE_CHANNELS,
    KVScheme,
    channel_groups,
)

_PER_OCTAVE, _SMALLEST = 8, -20  # steps 2**-20 to 2**11.9


class Affine(NamedTuple):
    """`x = codes * step + low`; float32 and broadcastable."""

    codes: Tensor
    step: Tensor
    low: Tensor

    def dense(self) -> Tensor:
        return self.codes.float().mul_(self.step).add_(self.low)


def encode_keys(scheme: KVScheme, keys: Tensor) -> Tensor:
    """Complete groups, float32 [..., group, dim] → uint8 [..., key_bytes]."""
    codes, parameters = _quantize(keys, -2, scheme.bits)
    packed = _pack(codes, scheme.bits)
    return torch.cat((packed.flatten(-2), parameters.transpose(-1, -2).flatten(-2)), -1)


def decode_keys(scheme: KVScheme, data: Tensor, dim: int) -> Affine:
    """uint8 [..., key_bytes] → codes [..., group, dim], step and low [..., 1, dim]."""
    cut = data.shape[-1] - 2 * dim
    packed = torch.unflatten(data[..., :cut], -1, (scheme.group, -1))
    step, low = _parameters(data[..., cut : cut + dim], data[..., cut + dim :], scheme.bits)
    return Affine(_unpack(packed, scheme.bits, dim), step[..., None, :], low[..., None, :])


def encode_values(scheme: KVScheme, values: Tensor) -> Tensor:
    """Single tokens, float32 [..., dim] → uint8 [..., value_bytes]."""
    return _encode_token(values, scheme.bits, VALUE_CHANNELS)


def decode_values(scheme: KVScheme, data: Tensor, dim: int) -> Affine:
    """uint8 [..., value_bytes] → codes [..., g, dim / g], step and low [..., g, 1]."""
    return _decode_token(data, scheme.bits, dim, VALUE_CHANNELS)


def encode_tail(keys: Tensor) -> Tensor:
    """Keys of single tokens, float32 [..., dim] → uint8 [..., tail_bytes]."""
    return _encode_token(keys, TAIL_BITS, TAIL_CHANNELS)


def decode_tail(data: Tensor, dim: int) -> Tensor:
    """uint8 [..., tail_bytes] → float32 [..., dim]."""
    return _decode_token(data, TAIL_BITS, dim, TAIL_CHANNELS).dense().flatten(-2)


def _encode_token(x: Tensor, bits: int, most: int) -> Tensor:
    grouped = torch.unflatten(x, -1, (channel_groups(x.shape[-1], most), -1))
    codes, parameters = _quantize(grouped, -1, bits)
    return torch.cat((_pack(codes.flatten(-2), bits), parameters.flatten(-2)), -1)


def _decode_token(data: Tensor, bits: int, dim: int, most: int) -> Affine:
    groups = channel_groups(dim, most)
    cut = data.shape[-1] - 2 * groups
    parameters = torch.unflatten(data[..., cut:], -1, (groups, 2))
    step, low = _parameters(parameters[..., 0], parameters[..., 1], bits)
    codes = torch.unflatten(_unpack(data[..., :cut], bits, dim), -1, (groups, -1))
    return Affine(codes, step[..., None], low[..., None])


def _quantize(x: Tensor, along: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 like `x` and parameters uint8 [..., 2], one pair per range along that axis."""
    top, unit = 2**bits - 1, 2 ** (bits - 4)
    # Apart: on CPUs `aminmax` along one dimension takes many times as long as both of these.
    low, high = x.amin(along, keepdim=True), x.amax(along, keepdim=True)
    reach = torch.maximum(low / (127 * unit), -low / (128 * unit))
    span = torch.maximum((high - low) / (top + 1 - unit), reach)
    steps = steps_on(x.device)
    index = torch.bucketize(span, steps).clamp_(max=len(steps) - 1)
    step = steps[index]
    # The offset is rounded down to its unit, except for half a step, by which codes are rounded.
    zero = torch.floor(low / (step * unit) + 0.5 / unit).clamp_(-128, 127)
    codes = torch.round(x / step - zero * unit).clamp_(0, top).to(torch.uint8)
    stored = zero.to(torch.int8).view(torch.uint8)
    return codes, torch.stack((index.to(torch.uint8), stored), -1).squeeze(along - 1)


def _parameters(index: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and low in float32 of stored parameters."""
    step = steps_on(index.device)[index.int()]
    return step, zero.view(torch.int8) * step * 2 ** (bits - 4)


@cache
def steps_on(device: torch.device) -> Tensor:
    """The 256 steps that a group can have, float32, ascending."""
    exponents = torch.arange(256, dtype=torch.float64) / _PER_OCTAVE + _SMALLEST
    return torch.exp2(exponents).float().to(device)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Two 4-bit codes a byte: the first half of the channels low, the second high."""
    if bits == 8:
        return codes
    half = (codes.shape[-1] + 1) // 2
    low, high = codes[..., :half], codes[..., half:]
    if high.shape[-1] < half:
        high = torch.nn.functional.pad(high, (0, 1))
    return low | high << 4


def _unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.cat((packed & 15, packed >> 4), -1)[..., :dim]
