"""Canonical forms to storage layouts and back, and the table of schemes.

The layouts are the same on every host (little-endian, no ISA choice, no thread count): an artifact
built here is mapped as it is elsewhere, with or without AVX-512 or a compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from compressors.tensor import LinearForm, StoredLinear
from gateway.engine.kernels.scheme import Scheme

# scheme → module exporting SCHEME; a new scheme is one file and one line here.
SCHEMES: dict[str, str] = {
    "dense": "gateway.engine.kernels.dense",
    "grouped": "gateway.engine.kernels.grouped",
    "sparse24": "gateway.engine.kernels.sparse24",
    "sparse": "gateway.engine.kernels.sparse",
    "lowrank": "gateway.engine.kernels.lowrank",
    "scaled": "gateway.engine.kernels.scaled",
    "rotated": "gateway.engine.kernels.rotated",
    "int8": "gateway.engine.kernels.int8",
    "float8": "gateway.engine.kernels.float8",
    "outlier": "gateway.engine.kernels.outlier",
    "table": "gateway.engine.kernels.table",
    "corrected": "gateway.engine.kernels.corrected",
    "nested": "gateway.engine.kernels.nested",
}


def scheme(name: str) -> Scheme:
    """The scheme called `name`.

    Raises:
        ValueError: no such scheme (an artifact from a newer version, or a damaged manifest).
    """
    if name not in SCHEMES:
        raise ValueError(f"unknown storage scheme {name!r}; known: {', '.join(SCHEMES)}")
    return cast(Scheme, import_module(SCHEMES[name]).SCHEME)


def pack(form: LinearForm, *, device: str = "cpu") -> StoredLinear:
    """`form` in its kernel's storage layout, with its tensors on `device`.

    Sub-byte codes are packed, scales become fp16 with a power-of-two exponent in the meta,
    symmetric forms store no zeros. Dense tensors are passed through (same storage), so an
    unchanged weight keeps its digest.

    Raises:
        ValueError: the form cannot be stored (non-finite scales, inconsistent shapes).
    """
    stored = scheme(form.scheme).pack(form, pack)
    if device == "cpu":
        return stored
    moved = {suffix: tensor.to(device) for suffix, tensor in stored.tensors.items()}
    return StoredLinear(stored.scheme, stored.layout, stored.meta, moved)


def unpack(stored: StoredLinear) -> LinearForm:
    """The canonical form of `stored`: codes exact, scales and broken zeros as rounded by `pack`.

    Raises:
        ValueError: unknown scheme or layout.
    """
    return scheme(stored.scheme).unpack(stored, unpack)
