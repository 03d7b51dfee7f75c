"""The compiled operations of `kernels/step.cpp` as Python sees them, and lists of them to run.

A `Program` is what one step computes: operations over fixed addresses, built once and run in one
call with the GIL released, and between them calls of Python where no operation does the work.
Compiled when the package is installed: nothing is compiled while it serves. Knows no model.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

ABI = 2
_PAIRS = 2  # the feature bit of bf16 products
_LINE = 64  # bytes of a vector and of a line of the cache


def _struct(pointers: str, numbers: str, reals: str = "") -> tuple[tuple[str, type], ...]:
    return (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int64) for name in numbers.split()),
        *((name, ctypes.c_double) for name in reals.split()),
    )


class Step(ctypes.Structure):
    """`Step` of step.h."""

    _fields_ = _struct("ids positions slots kept segments", "rows outputs count threads")


class Embed(ctypes.Structure):
    """`Embed` of step.h."""

    _fields_ = _struct("table out", "n bf16")


class Norm(ctypes.Structure):
    """`Norm` of step.h."""

    _fields_ = _struct("x add weight full half", "n kept", "eps")


class Linear(ctypes.Structure):
    """`Linear` of step.h."""

    _fields_ = _struct("run weight x out", "kept")


class Angles(ctypes.Structure):
    """`Angles` of step.h."""

    _fields_ = _struct("frequency out", "half", "scale")


class Rotate(ctypes.Structure):
    """`Rotate` of step.h."""

    _fields_ = _struct(
        "query key value query_norm key_norm angles keys values", "heads kv_heads dim bf16", "eps"
    )


class Attend(ctypes.Structure):
    """`Attend` of attend.h."""

    _fields_ = _struct(
        "query keys values full half",
        "heads kv_heads dim block_size window bf16 pairs",
        "scale",
    )


class Gate(ctypes.Structure):
    """`Gate` of step.h."""

    _fields_ = _struct("gate up full half", "n gelu")


class Scale(ctypes.Structure):
    """`Scale` of step.h."""

    _fields_ = _struct("x by full half", "n kept")


class Add(ctypes.Structure):
    """`Add` of step.h."""

    _fields_ = _struct("x add", "n")


class Pick(ctypes.Structure):
    """`Pick` of step.h."""

    _fields_ = _struct("x columns full half", "k n")


class Mix(ctypes.Structure):
    """`Mix` of step.h."""

    _fields_ = _struct("x signs full half", "n block")


class _Op(ctypes.Structure):
    """`Op` of step.h."""

    _fields_ = _struct("run args", "")


Args = Embed | Norm | Linear | Angles | Rotate | Attend | Gate | Scale | Add | Pick | Mix
_NAMES = {
    Embed: "embed",
    Norm: "norm",
    Linear: "linear",
    Angles: "angles",
    Rotate: "rotate",
    Attend: "attend",
    Gate: "gate",
    Scale: "scale",
    Add: "add",
    Pick: "pick",
    Mix: "mix",
}


class Operations:
    """The loaded library.

    Attributes:
        pairs: this CPU multiplies pairs of bf16.
    """

    def __init__(self, dll: ctypes.CDLL, features: int) -> None:
        self.pairs = bool(features & _PAIRS)
        self.step = dll.pressgate_step
        self.step.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self.step.restype = None
        self._address = {
            kind: ctypes.cast(getattr(dll, f"pressgate_{name}"), ctypes.c_void_p).value
            for kind, name in _NAMES.items()
        }

    def address(self, args: Args) -> int | None:
        """Of the function that runs operations with such arguments."""
        return self._address[type(args)]


@cache
def _open() -> Operations | None:
    """Map the library once per process. torch is imported first: both share one OpenMP runtime."""
    here = Path(__file__).parent / "kernels"
    found = [path for end in EXTENSION_SUFFIXES if (path := here / f"_step{end}").is_file()]
    if not found:
        log.info("native steps are not built; transformers' code runs the models")
        return None
    try:
        dll = ctypes.CDLL(str(found[0]))
        abi, features = dll.pressgate_step_abi(), dll.pressgate_step_features()
    except (OSError, AttributeError) as error:
        log.warning("native steps do not load (%s); transformers' code runs the models", error)
        return None
    if abi != ABI:
        log.warning("native steps are of version %s, not %s: reinstall the package", abi, ABI)
        return None
    return Operations(dll, features) if features else None


def operations() -> Operations | None:
    """The library when it is there, may be used, and this CPU can run it."""
    return None if os.environ.get("PRESSGATE_NATIVE", "1") == "0" else _open()


class Program:
    """Operations in order. Not thread-safe: they share buffers."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._new: list[Args] = []
        self._parts: list[tuple[ctypes.Array[_Op], int] | Callable[[Step], object]] = []
        self._keep: list[object] = []

    def add(self, args: Args) -> None:
        """Append a native operation. What its addresses point to must be kept by the caller."""
        self._new.append(args)

    def call(self, function: Callable[[Step], object]) -> None:
        """Append a call of Python."""
        self.finish()
        self._parts.append(function)

    def keep(self, owners: Iterable[object]) -> None:
        """Hold what owns the memory behind addresses."""
        self._keep += owners

    def finish(self) -> None:
        """Close the native part that is being built."""
        if not self._new:
            return
        ops = (_Op * len(self._new))(
            *(_Op(self._operations.address(args), ctypes.addressof(args)) for args in self._new)
        )
        self._keep += self._new
        self._parts.append((ops, len(self._new)))
        self._new = []

    def run(self, step: Step) -> None:
        """Run all of it; `finish` must have been called."""
        native, here = self._operations.step, ctypes.byref(step)
        for part in self._parts:
            if isinstance(part, tuple):
                native(part[0], part[1], here)
            else:
                part(step)


class Buffers:
    """Activations of a step by name and width: flat tensors of `rows` rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._kept: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def get(self, name: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows · width]; the same tensor for the same name, width and dtype."""
        if (name, width, dtype) not in self._kept:
            # Pages that are never used are never taken. Where numpy puts them, every vector may
            # lie in two lines of the cache, which makes products of many rows half as fast.
            size = self.rows * width * dtype.itemsize
            pages = torch.from_numpy(np.zeros(size + _LINE, dtype=np.uint8))
            start = -pages.data_ptr() % _LINE
            self._kept[name, width, dtype] = pages[start : start + size].view(dtype)
        return self._kept[name, width, dtype]


def rows_of(flat: Tensor, rows: int, width: int) -> Tensor:
    """The first `rows` rows of a flat buffer, [rows, width]."""
    return flat[: rows * width].view(rows, width)
