"""Integer codes in groups: the storage layout of weight-only quantization and its kernel module.

Layout `vnni16`. Rows in blocks of 16 (N padded), columns of each group padded to a whole number of
units. Codes are split into planes of 8, 4, 2 or 1 bits (3 bits = a 2-bit plane over a 1-bit
plane) and each plane is uint8 [blocks, units, 64]: byte `16 rows × 4 columns` of a unit holds, in
bit field i, column `4·i + j` of row r at byte `4·r + j`. One 64-byte load, a shift and an AND
give the operand of an int8 dot product (`vpdpbusd`) for 16 rows and 4 columns. Scales are fp16
[blocks, G, 16] times 2**scale_exponent; zeros uint8 when whole, else float relative to
2**(bits-1), and absent when symmetric.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.tensor import Grouped, StoredLinear
from gateway.engine.kernels.codes import Codes
from gateway.engine.kernels.native import Feature, GroupedStruct, NativeCall, library
from gateway.engine.kernels.on_cuda import packed_call
from gateway.engine.kernels.scheme import KernelLinear, PackChild, Scheme, UnpackChild, expect

BLOCK = 16
# bits → (plane width, left shift of the plane inside the code), widest first.
PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((2, 0),),
    3: ((2, 1), (1, 0)),
    4: ((4, 0),),
    5: ((4, 1), (1, 0)),
    6: ((4, 2), (2, 0)),
    7: ((4, 3), (2, 1), (1, 0)),
    8: ((8, 0),),
}


def pack(form: Grouped, _child: PackChild) -> StoredLinear:
    n, k = form.shape
    groups = form.scales.shape[1]
    if form.codes.dtype != torch.uint8 or form.zeros.shape != (n, groups) or groups < 1:
        raise ValueError(f"codes {tuple(form.codes.shape)} with zeros {tuple(form.zeros.shape)}")
    columns, width = _columns(form, groups, _unit(form.bits))
    codes = form.codes
    if columns is not None:
        codes = F.pad(codes, (0, 1)).index_select(1, torch.where(columns < 0, k, columns).long())
    codes = F.pad(codes, (0, groups * width - codes.shape[1], 0, -n % BLOCK))
    tensors = {
        f"codes{plane}": _interleave(codes >> shift & (1 << plane) - 1, plane)
        for plane, shift in PLANES[form.bits]
    }
    tensors["scales"], exponent = _pack_scales(form.scales)
    if not form.symmetric:
        tensors["zeros"] = _pack_zeros(form.zeros, form.bits)
    if columns is not None:
        tensors["columns"] = columns
    return StoredLinear(
        "grouped",
        "vnni16",
        {
            "n": n,
            "k": k,
            "bits": form.bits,
            "group": form.group,
            "width": width,
            "act_order": form.perm is not None,
            "scale_exponent": exponent,
        },
        tensors,
    )


def _columns(form: Grouped, groups: int, unit: int) -> tuple[Tensor | None, int]:
    """(int32 [groups·width]: source column of every stored one, -1 for padding; width of a group).

    None when stored columns are the layer's own, in order, with padding at the end only.
    """
    k = form.shape[1]
    if form.perm is None and (groups == 1 or form.group % unit == 0):
        return None, -(-min(form.group, k) // unit) * unit
    index = form.group_index()
    counts = torch.bincount(index, minlength=groups)
    width = -(-int(counts.max()) // unit) * unit
    order = torch.argsort(index, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(k, device=index.device) - starts[index[order]]
    columns = torch.full((groups * width,), -1, dtype=torch.int32, device=index.device)
    columns[index[order] * width + rank] = order.to(torch.int32)
    return columns, width


def _unit(bits: int) -> int:
    """Stored columns that kernels take in one step; the width of a group is a multiple."""
    return 16 if len(PLANES[bits]) == 1 else 32


def _interleave(values: Tensor, plane: int) -> Tensor:
    """uint8 [Np, Kp] of `plane`-bit values → uint8 [blocks, units, 64]."""
    fields = 8 // plane
    rows, cols = values.shape
    split = values.view(rows // BLOCK, BLOCK, cols // (4 * fields), fields, 4)
    out = torch.zeros_like(split[:, :, :, 0])
    for i in range(fields):
        out |= split[:, :, :, i] << (plane * i)
    return out.transpose(1, 2).reshape(rows // BLOCK, cols // (4 * fields), 64).contiguous()


def _deinterleave(packed: Tensor, plane: int) -> Tensor:
    """Inverse of `_interleave`: uint8 [16·blocks, Kp]."""
    fields = 8 // plane
    blocks, units, _ = packed.shape
    shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=packed.device).view(-1, 1)
    split = packed.view(blocks, units, BLOCK, 1, 4) >> shifts & (1 << plane) - 1
    return split.transpose(1, 2).reshape(blocks * BLOCK, units * fields * 4)


def _by_block(x: Tensor) -> Tensor:
    """[N, G] → [blocks, G, 16], zero rows appended."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % BLOCK))
    return padded.view(-1, BLOCK, x.shape[1]).transpose(1, 2).contiguous()


def _by_row(x: Tensor, n: int) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1])[:n]


def _pack_scales(scales: Tensor) -> tuple[Tensor, int]:
    """fp16 scales and the power of two taken out: full precision over a range of 2**29."""
    top = float(scales.abs().max()) if scales.numel() else 0.0
    if not math.isfinite(top):
        raise ValueError("a quantization scale is not finite")
    exponent = math.frexp(top)[1] - 15 if top else 0
    return _by_block(torch.ldexp(scales.float(), torch.tensor(-exponent)).half()), exponent


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    if bool(((zeros >= 0) & (zeros <= 255) & (zeros == zeros.round())).all()):
        return _by_block(zeros.to(torch.uint8))
    centred = zeros.float() - 2 ** (bits - 1)
    # fp16 keeps a zero point to 1/16 of a code up to ±128; beyond that it would cost accuracy.
    return _by_block(centred.half() if float(centred.abs().max()) <= 128 else centred)


def _zeros(packed: Tensor | None, bits: int, like: Tensor) -> Tensor:
    """float32 zeros in code units, [blocks, G, 16]."""
    if packed is None:
        return torch.full_like(like, 2 ** (bits - 1), dtype=torch.float32)
    return packed.float() + (0 if packed.dtype == torch.uint8 else 2 ** (bits - 1))


def unpack(stored: StoredLinear, _child: UnpackChild) -> Grouped:
    layer = GroupedLinear(stored, None, torch.float32, None)
    n, k = layer.out_features, layer.in_features
    codes = layer.codes(slice(None))[:n]
    perm = None
    if stored.meta["act_order"]:
        groups = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) // layer.width
        perm = groups[layer.place]
    scales = torch.ldexp(layer.scales.float(), torch.tensor(layer.exponent))
    return Grouped(
        codes=codes[:, :k] if layer.place is None else codes[:, layer.place],
        scales=_by_row(scales, n),
        zeros=_by_row(_zeros(layer.zeros, layer.bits, layer.scales), n),
        bits=layer.bits,
        group=int(stored.meta["group"]),
        perm=perm,
    )


class GroupedLinear(KernelLinear):
    """Weight-only quantized layer; computes from packed codes."""

    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None

    def __init__(
        self, stored: StoredLinear, bias: Tensor | None, dtype: torch.dtype, _child: object
    ) -> None:
        super().__init__(stored, bias, dtype)
        self.bits, self.width = int(stored.meta["bits"]), int(stored.meta["width"])
        if self.bits not in PLANES or int(stored.meta["n"]) < 1:
            raise ValueError(f"{self.bits}-bit codes for {self.out_features} rows")
        self.exponent = int(stored.meta["scale_exponent"])
        self.hold(stored, *(f"codes{plane}" for plane, _ in PLANES[self.bits]))
        self.hold(stored, "scales", "zeros", "columns")
        self._check()
        self._call = self.bind()

    def _check(self) -> None:
        """Every tensor is as long as the kernels will read.

        Raises:
            ValueError: the meta and the tensors disagree.
        """
        blocks, groups, width = -(-self.out_features // BLOCK), self.scales.shape[1], self.width
        if width < 1 or width % _unit(self.bits):
            raise ValueError(f"a group of {width} stored columns for {self.bits} bits")
        for plane, _ in PLANES[self.bits]:
            shape = (blocks, groups * width * plane // 32, 64)
            expect(self.get_buffer(f"codes{plane}"), shape, torch.uint8)
        expect(self.scales, (blocks, groups, BLOCK), torch.float16)
        if self.zeros is not None:
            kinds = (torch.uint8, torch.float16, torch.float32)
            expect(self.zeros, (blocks, groups, BLOCK), *kinds)
        if self.columns is None:
            if self.in_features > groups * width:
                raise ValueError(f"{groups} groups of {width} hold no {self.in_features} columns")
            return
        expect(self.columns, (groups * width,), torch.int32)
        kept = self.columns[self.columns >= 0]
        if not torch.equal(kept.sort().values.cpu(), torch.arange(self.in_features)):
            raise ValueError("the stored column order is not a permutation")

    def bind(self) -> NativeCall | None:
        self._packed = packed_call(self.packed(), self.columns, self.in_features, self.bias)
        dll = library(Feature.INT8)
        if dll is None or not self.scales.is_cpu:
            return None
        bias = None if self.bias is None else self.bias.float()
        struct = self.describe(bias)
        keep = (*self.buffers(), bias)
        return NativeCall(
            dll, "pressgate_grouped", struct, keep, max_rows=1 << 30, bf16_input=False
        )

    def packed(self) -> Codes:
        """The layer as kernels on a GPU see it: its very buffers."""
        planes, middle = PLANES[self.bits], float(2 ** (self.bits - 1))
        whole = self.zeros is not None and self.zeros.dtype == torch.uint8
        stored = self.scales.shape[1] * self.width
        return Codes(
            planes=tuple(self.get_buffer(f"codes{plane}") for plane, _ in planes),
            widths=tuple(plane for plane, _ in planes),
            factors=tuple(1 << shift for _, shift in planes),
            scales=self.scales,
            zeros=self.zeros,
            scale=2.0**self.exponent,
            zero_factor=1,
            offset=0.0 if whole else middle,
            width=self.width,
            n=self.out_features,
            k=self.in_features if self.columns is None else stored,
        )

    def describe(self, bias: Tensor | None) -> GroupedStruct:
        """The layer as native kernels see it: pointers into its buffers and `bias` (float32)."""
        planes = [self.get_buffer(f"codes{plane}") for plane, _ in PLANES[self.bits]]
        struct = GroupedStruct(
            scales=self.scales.data_ptr(),
            zeros=None if self.zeros is None else self.zeros.data_ptr(),
            columns=None if self.columns is None else self.columns.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            n=self.out_features,
            k=self.in_features,
            bits=self.bits,
            groups=self.scales.shape[1],
            width=self.width,
            zeros_bytes=0 if self.zeros is None else self.zeros.element_size(),
            scale=2.0**self.exponent,
            zero=float(2 ** (self.bits - 1)),
        )
        struct.planes[:] = [p.data_ptr() for p in planes] + [None] * (3 - len(planes))
        return struct

    @property
    def place(self) -> Tensor | None:
        """int64 [K]: where each column of the layer is stored; None when in order."""
        if self.columns is None:
            return None
        stored_at = torch.arange(self.columns.numel(), device=self.columns.device)
        kept = self.columns >= 0
        out = torch.empty(self.in_features, dtype=torch.int64, device=self.columns.device)
        out[self.columns[kept].long()] = stored_at[kept]
        return out

    def codes(self, blocks: slice) -> Tensor:
        """uint8 codes of some blocks of rows, [16·blocks, stored columns]."""
        out: Tensor | None = None
        for plane, shift in PLANES[self.bits]:
            part = _deinterleave(self.get_buffer(f"codes{plane}")[blocks], plane) << shift
            out = part if out is None else out | part
        assert out is not None
        return out

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self._packed is not None:
            return self._packed.rows(start, stop, dtype)
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        codes = self.codes(blocks)
        scales = self.scales[blocks]
        zeros = None if self.zeros is None else self.zeros[blocks]
        grouped = codes.view(codes.shape[0], -1, self.width).float()
        grouped -= _by_row(_zeros(zeros, self.bits, scales), codes.shape[0]).unsqueeze(-1)
        scale = scales.float() * 2.0**self.exponent
        grouped *= _by_row(scale, codes.shape[0]).unsqueeze(-1)
        weight = grouped.flatten(1)
        place = self.place
        weight = weight[:, : self.in_features] if place is None else weight[:, place]
        return weight[start % BLOCK : start % BLOCK + stop - start].to(dtype)


SCHEME = Scheme(pack, unpack, GroupedLinear)
