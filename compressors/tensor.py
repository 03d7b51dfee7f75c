"""Compressed forms of one linear layer: what a method returns and what a kernel computes from.

A form is a frozen bundle of tensors in one *canonical* layout, independent of any kernel. Weights
are always `[out_features, in_features]` (N × K), as in `torch.nn.Linear`. `dense()` is the meaning
of every form by definition; kernels are tested against it. Sub-byte codes travel unpacked here (one
uint8 per code); `compressors.packing` packs them, kernels choose their own storage layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

Meta = dict[str, int | float | str | bool]


class LinearForm(ABC):
    """One linear layer's weight. Bias is never compressed and travels beside the form."""

    scheme: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer it stands for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its facts: codes bit-packed, scales and zeros in 16 bits."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight it computes with, [N, K], in `dtype`."""

    @abstractmethod
    def stored_as(self, dtype: torch.dtype) -> LinearForm:
        """The form on the CPU with every dense part in `dtype`."""


@dataclass(frozen=True, eq=False)
class Dense(LinearForm):
    """Uncompressed weight [N, K] in its own dtype."""

    weight: Tensor
    scheme: ClassVar[str] = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def stored_as(self, dtype: torch.dtype) -> Dense:
        return Dense(self.weight.to("cpu", dtype))


@dataclass(frozen=True, eq=False)
class Grouped(LinearForm):
    """Integer quantization in groups along K: `W[n,k] = scale[n,g] * (code[n,k] - zero[n,g])`.

    Attributes:
        codes: uint8 [N, K], values in [0, 2**bits).
        scales: float32 [N, G], G = ceil(K / group); the last group may be short.
        zeros: float32 [N, G], in code units (2**(bits-1) everywhere for a symmetric scheme; may be
            fractional, as HQQ's are).
        bits: 2..8.
        group: columns per group; K for per-channel.
        perm: int32 [K] or None. With activation order (GPTQ `desc_act`), column k of the layer
            belongs to group `perm[k]` (AutoGPTQ's `g_idx`); None means `k // group`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    perm: Tensor | None = None
    scheme: ClassVar[str] = "grouped"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def group_index(self) -> Tensor:
        """int64 [K]: the group of every column."""
        if self.perm is not None:
            return self.perm.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        n, k = self.shape
        if self.perm is None and k % self.group == 0:  # without a copy of every scale per column
            codes = self.codes.reshape(n, -1, self.group).float()
            codes.sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))
            return codes.view(n, k).to(dtype)
        index = self.group_index()
        return (self.scales[:, index] * (self.codes.float() - self.zeros[:, index])).to(dtype)

    @property
    def nbytes(self) -> int:
        per_group = 2 if self.symmetric else 4
        permutation = 0 if self.perm is None else 4 * self.perm.numel()
        codes = -(-self.codes.numel() * self.bits // 8)
        return codes + self.scales.numel() * per_group + permutation

    def stored_as(self, dtype: torch.dtype) -> Grouped:
        codes, scales, zeros = (t.cpu() for t in (self.codes, self.scales, self.zeros))
        perm = None if self.perm is None else self.perm.cpu()
        return replace(self, codes=codes, scales=scales, zeros=zeros, perm=perm)


@dataclass(frozen=True, eq=False)
class Sparse24(LinearForm):
    """2:4 sparsity: of every four neighbouring columns two are kept.

    Attributes:
        values: the kept weights as a form of shape [N, K/2] (`Dense`, or `Grouped` for a stack
            such as `sparse24-wanda+int8`), in column order.
        index: uint8 [N, K/2], the position 0..3 of each kept value inside its group of four,
            ascending inside a group.
    """

    values: LinearForm
    index: Tensor
    scheme: ClassVar[str] = "sparse24"

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1] * 2

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        n, half = self.index.shape
        base = torch.arange(half, device=self.index.device) // 2 * 4
        out = torch.zeros(n, half * 2, dtype=dtype, device=self.index.device)
        return out.scatter_(1, base + self.index.long(), self.values.dense(dtype))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + -(-self.index.numel() * 2 // 8)

    def stored_as(self, dtype: torch.dtype) -> Sparse24:
        return Sparse24(self.values.stored_as(dtype), self.index.cpu())


@dataclass(frozen=True, eq=False)
class LowRank(LinearForm):
    """`W ≈ left @ right`: left is [N, r], right is [r, K]; each is a form of its own."""

    left: LinearForm
    right: LinearForm
    scheme: ClassVar[str] = "lowrank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.left.dense(torch.float32) @ self.right.dense(torch.float32)).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def stored_as(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.left.stored_as(dtype), self.right.stored_as(dtype))


@dataclass(frozen=True, eq=False)
class StoredLinear:
    """A form in a kernel's storage layout: an artifact holds it, a kernel maps it as it is.

    Attributes:
        scheme: the form's scheme, e.g. `grouped`.
        layout: name of the storage layout, e.g. `rowmajor`, `vnni16`.
        meta: plain numbers and words the kernel needs besides tensors (bits, group, shapes).
        tensors: suffix → tensor, e.g. `codes`, `scales`; nested forms use dotted suffixes
            (`left.codes`).
    """

    scheme: str
    layout: str
    meta: Meta
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
