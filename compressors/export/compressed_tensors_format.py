"""compressed-tensors' tensors of one linear layer, to and from canonical forms.

Pure tensors: no files (those are `compressed_tensors` and `compressed_tensors_writer`). The layouts
as the compressed-tensors package (0.15 to 0.20), transformers and vLLM read them, for N outputs, K
inputs and G groups:

`pack-quantized` (integers, computed with in the model's float type):

    weight_packed      int32 [N, ceil(K·bits/32)]   codes along K, lowest bits first
    weight_scale       float [N, G]                 G = 1 per channel
    weight_zero_point  int32 [ceil(N·bits/32), G]   packed along N; absent when symmetric
    weight_shape       int64 [2]                    (N, K)
    weight_g_idx       int32 [K]                    old files only: group of every column

Codes are unsigned, 0..2**bits-1, with the zero point in the same units; symmetric means a zero
point of 2**(bits-1). `int-quantized`, `float-quantized` and `naive-quantized` keep one value per
element (int8, or float8_e4m3fn) in `weight` [N, K] with `weight_scale` [N, 1], [N, G] or one
number; int8 values and zero points are then signed. The first two also quantize the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from compressors.export.autogptq_format import WORD, pack_words, unpack_words
from compressors.export.packed import FormatError, take
from compressors.forms.float8 import Float8
from compressors.forms.int8 import Int8
from compressors.forms.nested import CHILD_BITS, RATIO, Nested
from compressors.tensor import Grouped, LinearForm

PARTS = (
    "weight_scale",
    "weight",
    "weight_packed",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
PACK_BITS = (2, 3, 4, 8)
_WHOLE = 32  # codes after which packing starts again at a word's lowest bit, for every width


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """How the weights of a group of linears are quantized, the facts of a config group.

    Attributes:
        group: columns per scale; None is one scale per output channel, 0 one for the whole weight.
        inputs: the layer's inputs are quantized too, to 8 bits of the same type, per token.
    """

    type: Literal["int", "float"]
    bits: int
    group: int | None
    symmetric: bool = True
    inputs: bool = False

    @property
    def format(self) -> str:
        """The name of the layout that holds them."""
        if self.type == "float":
            return "float-quantized"
        return "int-quantized" if self.inputs else "pack-quantized"

    def config_group(self, targets: Iterable[str]) -> dict[str, Any]:
        """The entry of `config_groups` for linears of these names."""
        entry: dict[str, Any] = {"targets": list(targets), "format": self.format}
        entry["weights"] = self._numbers(
            {None: "channel", 0: "tensor"}.get(self.group, "group"), dynamic=False
        ) | {"group_size": self.group or None, "symmetric": self.symmetric}
        entry["input_activations"] = self._numbers("token", dynamic=True) if self.inputs else None
        entry["output_activations"] = None
        return entry

    def _numbers(self, strategy: str, *, dynamic: bool) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": True,
            "strategy": strategy,
            "dynamic": dynamic,
        }


def pack_grouped(form: Grouped) -> tuple[WeightArgs, dict[str, Tensor]]:
    """`pack-quantized` tensors of a form: codes exact, scales in float16 where that holds them.

    Raises:
        FormatError: what the format cannot hold, e.g. columns out of order or a short last group.
    """
    n, k = form.shape
    if form.bits not in PACK_BITS:
        raise FormatError(f"{form.bits} bits: the format has {', '.join(map(str, PACK_BITS))}")
    if form.perm is not None:
        raise FormatError(
            "its columns are grouped out of order (activation order), which compressed-tensors no "
            "longer has; the gptq format does"
        )
    channel = form.group >= k
    if not channel and k % form.group:
        raise FormatError(f"{k} columns do not divide into groups of {form.group}")
    zeros = form.zeros.round()
    if not torch.equal(zeros, form.zeros):
        raise FormatError("zero points are fractional; the format holds whole numbers")
    if float(zeros.min()) < 0 or float(zeros.max()) > 2**form.bits - 1:
        raise FormatError(f"zero points outside 0..{2**form.bits - 1}")
    args = WeightArgs("int", form.bits, None if channel else form.group, form.symmetric)
    tensors = {
        "weight_packed": _packed(form.codes, form.bits),
        "weight_scale": narrow_scales(form.scales),
        "weight_shape": torch.tensor([n, k]),
    }
    if not form.symmetric:
        packed = _packed(zeros.to(torch.uint8).t().contiguous(), form.bits)
        tensors["weight_zero_point"] = packed.t().contiguous()
    return args, tensors


def unpack_grouped(stored: dict[str, Tensor], shape: tuple[int, int], args: WeightArgs) -> Grouped:
    """The form of `pack-quantized` tensors; scales become float32, nothing is rounded.

    Raises:
        FormatError: dtypes or shapes that do not belong together.
    """
    n, k = shape
    words = take(stored, "weight_packed")
    if words.dtype != torch.int32 or tuple(words.shape) != (n, -(-k * args.bits // WORD)):
        raise FormatError(
            f"weight_packed is {words.dtype} {list(words.shape)}, which is no packing of {k} "
            f"columns of {args.bits} bits"
        )
    declared = stored.get("weight_shape")
    if declared is not None and declared.flatten().tolist() != [n, k]:
        raise FormatError(f"weight_shape is {declared.tolist()}, the config says {[n, k]}")
    scales, group = scales_of(stored, shape, args)
    half = 2 ** (args.bits - 1)
    zeros = torch.full_like(scales, half)
    if not args.symmetric:
        packed = take(stored, "weight_zero_point")
        want = (-(-n * args.bits // WORD), scales.shape[1])
        if packed.dtype != torch.int32 or tuple(packed.shape) != want:
            raise FormatError(
                f"weight_zero_point is {packed.dtype} {list(packed.shape)}, not int32 {list(want)}"
            )
        zeros = _unpacked(packed.t().contiguous(), args.bits, n).t().float().contiguous()
    codes = _unpacked(words, args.bits, k)
    return Grouped(codes, scales, zeros, args.bits, group, _order(stored, k, scales.shape[1]))


def pack(form: LinearForm) -> tuple[WeightArgs, dict[str, Tensor]]:
    """The settings and tensors of a form.

    Raises:
        FormatError: what the format cannot hold.
    """
    if isinstance(form, Grouped):
        return pack_grouped(form)
    if isinstance(form, Nested):
        return pack_grouped(_parent(form))
    if isinstance(form, Int8):
        if form.inputs is not None:
            raise FormatError("its inputs are scaled per column, for which the format has no place")
        args = WeightArgs("int", 8, None, inputs=True)
        return args, {"weight": form.codes, "weight_scale": form.scales.reshape(-1, 1)}
    if isinstance(form, Float8):
        args = WeightArgs("float", 8, None, inputs=True)
        return args, {"weight": form.codes, "weight_scale": form.scales.reshape(-1, 1)}
    raise FormatError(f"{_REFUSED.get(form.scheme, f'a {form.scheme} weight')} {_HOLDS}")


_REFUSED = {
    "sparse24": "a 2:4 sparse weight (its sparse layouts were given up upstream)",
    "sparse": "a sparse weight (its sparse layouts were given up upstream)",
    "lowrank": "a product of two factors",
    "scaled": "a weight whose inputs are scaled",
    "outlier": "a weight with columns in 16 bits",
    "corrected": "a weight with a low-rank correction",
}
_HOLDS = "has no compressed-tensors form; it holds integer groups and 8-bit weights"


def _parent(form: Nested) -> Grouped:
    """Both halves on their one uniform grid: 8·code + low counts eighths of the child's step."""
    codes = form.child.codes * RATIO + form.low
    zeros = form.child.zeros * RATIO + 2 ** (CHILD_BITS - 1)
    scales = form.child.scales / RATIO
    return Grouped(codes, scales, zeros, 8, form.child.group, form.child.perm)


def unpack(stored: dict[str, Tensor], shape: tuple[int, int], args: WeightArgs) -> LinearForm:
    """The form of stored tensors; nothing is rounded.

    Values whose inputs are quantized with one step per token keep that; with any other grouping the
    inputs are left as they are, which is at least as precise.

    Raises:
        FormatError: dtypes or shapes that do not belong together.
    """
    if "weight_packed" in stored:
        return unpack_grouped(stored, shape, args)
    weight = take(stored, "weight")
    if tuple(weight.shape) != shape:
        raise FormatError(f"weight is {list(weight.shape)}, not {list(shape)}")
    if weight.dtype == torch.float8_e4m3fn:
        if args.group:
            raise FormatError("float8 weights in groups cannot be read; known: tensor, channel")
        return Float8(weight, scales_of(stored, shape, args)[0][:, 0].contiguous())
    if weight.dtype != torch.int8:
        raise FormatError(f"weight is {weight.dtype}, not int8 or float8_e4m3fn")
    if args.inputs and args.symmetric and not args.group and args.bits == 8:
        return Int8(weight, scales_of(stored, shape, args)[0][:, 0].contiguous())
    return _from_int8(stored, shape, args)


def _from_int8(stored: dict[str, Tensor], shape: tuple[int, int], args: WeightArgs) -> Grouped:
    """Signed values, of `bits` or fewer, as unsigned codes."""
    weight, half = take(stored, "weight"), 2 ** (args.bits - 1)
    if int(weight.min()) < -half or int(weight.max()) >= half:
        raise FormatError(f"values do not fit {args.bits} bits")
    scales, group = scales_of(stored, shape, args)
    zeros = torch.full_like(scales, half)
    if not args.symmetric:
        signed = take(stored, "weight_zero_point")
        if signed.numel() not in (1, scales.numel()):
            raise FormatError(f"weight_zero_point is {list(signed.shape)}")
        zeros = zeros + signed.float().reshape(-1, 1 if signed.numel() == 1 else scales.shape[1])
    codes = (weight.to(torch.int16) + half).to(torch.uint8)
    return Grouped(codes, scales, zeros, args.bits, group, _order(stored, shape[1], zeros.shape[1]))


def scales_of(
    stored: dict[str, Tensor], shape: tuple[int, int], args: WeightArgs
) -> tuple[Tensor, int]:
    """float32 scales [N, G] and the columns per group.

    Raises:
        FormatError: another shape than the settings say, or not finite.
    """
    n, k = shape
    group = k if not args.group else args.group
    if group != k and k % group:
        raise FormatError(f"{k} columns do not divide into groups of {group}")
    scales = take(stored, "weight_scale")
    if not scales.is_floating_point() or scales.numel() not in (
        {1, n} if args.group == 0 else {n * (k // group)}
    ):
        raise FormatError(
            f"weight_scale is {scales.dtype} {list(scales.shape)}, expected [{n}, {k // group}]"
        )
    if not bool(torch.isfinite(scales).all()):
        raise FormatError("scales are not finite")
    wide = scales.float().reshape(-1, 1) if args.group == 0 else scales.float().reshape(n, -1)
    return wide.expand(n, k // group).contiguous(), group


def narrow_scales(scales: Tensor) -> Tensor:
    """In float16 where it holds them to its precision, else in float32."""
    half = scales.to(torch.float16)
    off = (half.float() - scales).abs() > scales.abs() * 2**-11
    return scales if bool(off.any()) or not bool(torch.isfinite(half).all()) else half


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, L] as int32 [R, ceil(L·bits/32)]."""
    length = codes.shape[1]
    words = pack_words(functional.pad(codes, (0, -length % _WHOLE)), bits)
    return words[:, : -(-length * bits // WORD)].contiguous()


def _unpacked(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `_packed`."""
    codes = unpack_words(functional.pad(words, (0, -words.shape[1] % bits)), bits)
    return codes[:, :length].contiguous()


def _order(stored: dict[str, Tensor], k: int, groups: int) -> Tensor | None:
    """Group of every column, None when they are in order (-1 stands for that in old files)."""
    index = stored.get("weight_g_idx")
    if index is None or bool((index < 0).all()):
        return None
    if index.is_floating_point() or tuple(index.shape) != (k,) or int(index.max()) >= groups:
        raise FormatError(f"weight_g_idx is {index.dtype} {list(index.shape)} over {groups} groups")
    if int(index.min()) < 0:
        raise FormatError("weight_g_idx names negative groups")
    in_order = torch.arange(k) // max(1, k // groups)
    return None if torch.equal(index.long(), in_order) else index.to(torch.int32)
