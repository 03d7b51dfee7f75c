"""Random forms of every scheme, small and odd-shaped."""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.corrected import Corrected
from compressors.forms.float8 import Float8
from compressors.forms.int8 import Int8
from compressors.forms.nested import Nested
from compressors.forms.outlier import Outlier
from compressors.forms.scaled import Scaled
from compressors.forms.sparse import Bitmap
from compressors.prune.magnitude import keep_best
from compressors.tensor import Dense, Grouped, LinearForm, LowRank, Sparse24


def grouped(
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 64,
    zeros: str = "symmetric",
    perm: bool = False,
) -> Grouped:
    """`zeros`: symmetric, whole (asymmetric), fraction (HQQ) or far (outside the code range)."""
    n, k = shape
    group = min(group, k)
    groups = -(-k // group)
    offsets = {
        "symmetric": torch.full((n, groups), 2.0 ** (bits - 1)),
        "whole": torch.randint(0, 2**bits, (n, groups)).float(),
        "fraction": torch.rand(n, groups) * 2**bits,
        "far": torch.randn(n, groups) * 500,
    }
    index = (torch.arange(k) // group)[torch.randperm(k)].to(torch.int32)
    return Grouped(
        codes=torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        scales=torch.rand(n, groups) * 0.01 + 1e-4,
        zeros=offsets[zeros],
        bits=bits,
        group=group,
        perm=index if perm else None,
    )


def nested(shape: tuple[int, int], *, zeros: str = "whole", perm: bool = False) -> Nested:
    child = grouped(shape, bits=4, group=32, zeros=zeros, perm=perm)
    return Nested(child, torch.randint(0, 16, shape, dtype=torch.uint8))


def dense(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Dense:
    return Dense(torch.randn(shape).to(dtype))


def kept(shape: tuple[int, int]) -> Tensor:
    """A random 2:4 index, uint8 [N, K/2]."""
    n, k = shape
    picks = torch.rand(n * k // 4, 4).topk(2).indices.sort().values
    return picks.reshape(n, k // 2).to(torch.uint8)


def sparse(shape: tuple[int, int], values: LinearForm | None = None) -> Sparse24:
    return Sparse24(values or dense((shape[0], shape[1] // 2)), kept(shape))


def int8(shape: tuple[int, int]) -> Int8:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    return Int8(codes, torch.rand(shape[0]) * 0.01 + 1e-4)


def float8(shape: tuple[int, int]) -> Float8:
    return Float8(torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(shape[0]) + 0.1)


def outlier(shape: tuple[int, int], columns: int = 3) -> Outlier:
    picked = torch.randperm(shape[1])[:columns].sort().values
    rest = int8(shape)
    rest.codes[:, picked] = 0
    used = torch.ones(shape[1]).index_fill_(0, picked, 0.0)
    apart = dense((shape[0], columns))
    return Outlier(Int8(rest.codes, rest.scales, used), apart, picked.to(torch.int32))


def bitmap(
    shape: tuple[int, int], group: int | None = None, values: LinearForm | None = None
) -> Bitmap:
    """Half of every `group` columns kept at random; None: half of the row."""
    kept = half(shape[1], group)
    return Bitmap(values or dense((shape[0], kept)), keep_best(torch.rand(shape), group))


def half(k: int, group: int | None) -> int:
    """Weights that a row of `bitmap` keeps."""
    group = group or k
    return k // group * -(-group // 2) + (k % group + 1) // 2


def every(n: int = 33, k: int = 100) -> dict[str, LinearForm]:
    """One form per kind of storage and kernel; k is a multiple of 4."""
    forms: dict[str, LinearForm] = {
        f"int{bits}": grouped((n, k), bits=bits, group=32, zeros="whole") for bits in range(2, 9)
    }
    forms |= {
        "int8-channel": grouped((n, k), bits=8, group=k),
        "int4-sym": grouped((n, k)),
        "int4-fraction": grouped((n, k), zeros="fraction"),
        "int4-far": grouped((n, k), zeros="far"),
        "int4-ragged": grouped((n, k), group=20),
        "int4-act-order": grouped((n, k), group=32, zeros="whole", perm=True),
        "int3-act-order": grouped((n, k), bits=3, group=20, perm=True),
        "bf16": dense((n, k)),
        "fp16": dense((n, k), torch.float16),
        "fp32": dense((n, k), torch.float32),
        "sparse": sparse((n, k)),
        "sparse-fp32": sparse((n, k), dense((n, k // 2), torch.float32)),
        "sparse-int8": sparse((n, k), grouped((n, k // 2), bits=8, group=k)),
        "sparse-int4": sparse((n, k), grouped((n, k // 2), group=32)),
        "bitmap48": bitmap((n, k), 8),
        "bitmap50": bitmap((n, k)),
        "bitmap50-fp32": bitmap((n, k), None, dense((n, half(k, None)), torch.float32)),
        "bitmap48-int4": bitmap((n, k), 8, grouped((n, half(k, 8)), group=32)),
        "bitmap50-int8": bitmap((n, k), None, grouped((n, half(k, None)), bits=8, group=k)),
        "bitmap50-int3": bitmap(
            (n, k), None, grouped((n, half(k, None)), bits=3, group=20, zeros="whole")
        ),
        "lowrank": LowRank(dense((n, 7)), dense((7, k))),
        "lowrank-int8": LowRank(dense((n, 8)), grouped((8, k), bits=8, group=k)),
        "scaled-fp32": Scaled(dense((n, k), torch.float32), torch.rand(k) + 0.5),
        "scaled-int4": Scaled(grouped((n, k), group=32, zeros="whole"), torch.rand(k) / 2 + 0.5),
        "corrected-int3": Corrected(
            grouped((n, k), bits=3, group=32, zeros="whole"),
            LowRank(grouped((n, 7), bits=8, group=7), grouped((7, k), bits=8, group=k)),
        ),
        "nested": nested((n, k)),
        "nested-act-order": nested((n, k), perm=True),
        "nested-fraction": nested((n, k), zeros="fraction"),
        "w8a8": int8((n, k)),
        "w8a8-outlier": outlier((n, k)),
        "fp8": float8((n, k)),
    }
    return forms
