"""The compiled kernels of `native.cpp`, if this host has them: finding, checking and calling.

The library is built once, when the package is installed (`setup.py`), not at first use: a server
needs no compiler and runs no code from a writable cache. Where there is no compiler, no AVX-512, or
`PRESSGATE_NATIVE=0`, `library()` answers None and layers compute through torch from the same
layouts.
"""

from __future__ import annotations

import ctypes
import logging
import os
from enum import IntFlag
from functools import cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ABI = 6

UNLIMITED = 1 << 30  # rows
FORMATS = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}  # `Format` of native.cpp


class Feature(IntFlag):
    """What this CPU can run; the values are `native.cpp`'s."""

    INT8 = 1
    BF16 = 2
    SPARSE = 4
    NESTED = 32
    KV = 64


class GroupedStruct(ctypes.Structure):
    """`Grouped` of native.cpp."""

    _fields_ = (
        ("planes", ctypes.c_void_p * 3),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("zeros_bytes", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_float),
    )


class Int8Struct(ctypes.Structure):
    """`Int8` of native.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class Float8Struct(ctypes.Structure):
    """`Float8` of native.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class DenseStruct(ctypes.Structure):
    """`Dense` of native.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("ragged", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


@cache
def _open() -> tuple[ctypes.CDLL, Feature] | None:
    """Map the library once per process. torch is imported first: both share one OpenMP runtime."""
    here = Path(__file__).parent
    found = [path for end in EXTENSION_SUFFIXES if (path := here / f"_native{end}").is_file()]
    if not found:
        log.info("native kernels are not built; using torch operations")
        return None
    try:
        dll = ctypes.CDLL(str(found[0]))
        abi = dll.pressgate_abi()
    except (OSError, AttributeError) as error:
        log.warning("native kernels do not load (%s); using torch operations", error)
        return None
    if abi != ABI:
        log.warning("native kernels are of version %s, not %s: reinstall the package", abi, ABI)
        return None
    features = Feature(dll.pressgate_features())
    if not features:
        log.info("this CPU lacks AVX-512 VNNI; using torch operations")
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, pointer, number, ctypes.c_int, number)
    for name in ("grouped", "int8", "float8", "dense"):
        function = getattr(dll, f"pressgate_{name}")
        function.argtypes, function.restype = arguments, None
    if Feature.KV in features:
        dll.pressgate_kv.argtypes, dll.pressgate_kv.restype = (pointer, pointer, number), None
    for function in (dll.pressgate_expand, dll.pressgate_float8_expand):
        function.argtypes, function.restype = (pointer, number, number, pointer, number), None
    return dll, features


def library(needs: Feature) -> ctypes.CDLL | None:
    """The library when it is there, may be used, and this CPU has all that `needs` names."""
    if os.environ.get("PRESSGATE_NATIVE", "1") == "0":
        return None
    opened = _open()
    return opened[0] if opened and needs in opened[1] else None


@cache
def fused() -> ModuleType | None:
    """The Triton kernels of `fused.py`, None where Triton is not (it comes with CUDA's torch)."""
    if os.environ.get("PRESSGATE_NATIVE", "1") == "0" or find_spec("triton") is None:
        return None
    return import_module("gateway.engine.kernels.fused")


class NativeCall:
    """One weight bound to one kernel. Calls are thread-safe; the GIL is released inside.

    Args:
        dll: the library; `entry` names the function in it.
        struct: the weight's description; pointers into `keep`.
        keep: what owns the memory behind the pointers.
        max_rows: above this many rows of bf16 activations another path is faster.
        bf16_input: the kernel reads bf16 only; other activations are rounded to it.
    """

    __slots__ = ("_expand", "_function", "_keep", "address", "bf16_input", "k", "max_rows", "n")

    def __init__(
        self,
        dll: ctypes.CDLL,
        entry: str,
        struct: GroupedStruct | Int8Struct | Float8Struct | DenseStruct,
        keep: tuple[object, ...],
        *,
        bf16_input: bool,
        max_rows: int = UNLIMITED,
    ) -> None:
        self._function, self._keep = getattr(dll, entry), (struct, keep)
        own = isinstance(struct, Float8Struct)
        self._expand = dll.pressgate_float8_expand if own else dll.pressgate_expand
        self.address = ctypes.addressof(struct)
        self.n, self.k = int(struct.n), int(struct.k)
        self.max_rows, self.bf16_input = max_rows, bf16_input

    @property
    def entry(self) -> int:
        """Address of the function, for native code that calls it."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel accepts these activations (and is the faster path for so many)."""
        if not x.is_cpu:
            return False
        if x.dtype is torch.bfloat16:
            return 0 < x.numel() <= self.max_rows * self.k
        # Always for float32: with its rounding to bf16 here and not there, a batch would show.
        return x.dtype is torch.float32 and x.numel() > 0

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty((*x.shape[:-1], self.n), dtype=x.dtype)
        source = x.to(torch.bfloat16) if self.bf16_input else x
        source = source.contiguous()
        self._function(
            self.address,
            source.data_ptr(),
            out.data_ptr(),
            x.numel() // self.k,
            x.dtype is torch.bfloat16,
            torch.get_num_threads(),
        )
        return out

    def expand(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of a sparse or E4M3 weight, dense, bf16 [stop-start, K]."""
        out = torch.empty(stop - start, self.k, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        self._expand(self.address, start, stop, out.data_ptr(), threads)
        return out


def dense_call(dll: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> NativeCall:
    """Weights in bf16, fp16 or float32, row-major [N, K]."""
    n, k = weight.shape
    bias = None if bias is None else bias.float()
    struct = DenseStruct(
        weight=weight.data_ptr(),
        bias=_address(bias),
        n=n,
        k=k,
        stride=k,
        format=FORMATS[weight.dtype],
    )
    keep = (weight, bias)
    rounds = weight.dtype == torch.bfloat16
    return NativeCall(dll, "pressgate_dense", struct, keep, bf16_input=rounds)


def sparse_call(
    dll: ctypes.CDLL,
    values: Tensor | NativeCall,
    mask: Tensor,
    bias: Tensor | None,
    *,
    k: int,
    max_rows: int,
    ragged: bool = False,
) -> NativeCall:
    """Sparse weights: `values` are bf16 [N, kept] or the call of a grouped layer [N, kept].

    Args:
        ragged: the bitmap may keep other than 16 of 32 columns; else a row of bf16 values holds 16
            for every 32 columns begun.
    """
    n = mask.shape[0]
    bias = None if bias is None else bias.float()
    struct = DenseStruct(mask=mask.data_ptr(), bias=_address(bias), n=n, k=k, ragged=ragged)
    if isinstance(values, NativeCall):
        struct.codes = values.address
    else:
        struct.weight, struct.stride = values.data_ptr(), values.shape[1]
    keep = (values, mask, bias)
    return NativeCall(dll, "pressgate_dense", struct, keep, max_rows=max_rows, bf16_input=True)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
