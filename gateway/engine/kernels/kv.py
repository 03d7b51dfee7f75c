"""The compiled decode attention over quantized keys and values, if this host has it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compressors.kv_scheme import TAIL_CHANNELS, VALUE_CHANNELS, KVScheme, channel_groups
from compressors.quantize.kv import steps_on
from gateway.engine.kernels.native import Feature, library

_LANES = 16


class _Layer(ctypes.Structure):
    """`Kv` of kv.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "block_bytes",
                "key_room",
                "key_stride",
                "tail_stride",
                "heads",
                "group",
                "key_dim",
                "value_dim",
                "bits",
                "tail_groups",
                "value_groups",
            )
        ),
    )


class _Step(ctypes.Structure):
    """`KvStep` of kv.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "key", "value", "out", "writes", "tails", "own", "tables")
        ),
        *((name, ctypes.c_int64) for name in ("batch", "context", "per_head", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class KVCall:
    """One layer's blocks bound to the kernel.

    Args:
        blocks: uint8 [num_blocks, block bytes] on the CPU, written in place.
    """

    def __init__(
        self, dll: ctypes.CDLL, blocks: Tensor, scheme: KVScheme, heads: int, dims: tuple[int, int]
    ) -> None:
        key_dim, value_dim = dims
        room = scheme.key_room(heads, key_dim)
        stride = room // heads
        steps = steps_on(blocks.device)
        self._call, self._keep = dll.pressgate_kv, (blocks, steps)
        self._heads, self._dims = heads, dims
        self._layer = _Layer(
            blocks=blocks.data_ptr(),
            steps=steps.data_ptr(),
            block_bytes=blocks.stride(0),
            key_room=room,
            key_stride=stride,
            tail_stride=scheme.group * scheme.tail_bytes(key_dim) if scheme.tail_blocks else stride,
            heads=heads,
            group=scheme.group,
            key_dim=key_dim,
            value_dim=value_dim,
            bits=scheme.bits,
            tail_groups=channel_groups(key_dim, TAIL_CHANNELS),
            value_groups=channel_groups(value_dim, VALUE_CHANNELS),
        )

    def __call__(
        self,
        rows: tuple[Tensor, Tensor, Tensor],
        places: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Store one token per row and attend; float32 [batch, heads, value_dim].

        Args:
            rows: query [batch, heads, dim], key and value [batch, kv_heads, dim].
            places: writes, tails, own (int64 [batch] each) and tables (int64 [batch * blocks]), as
                `attention.Step` has them.
        """
        query, key, value = (row.float().contiguous() for row in rows)
        batch, heads = query.shape[:2]
        out = torch.empty(batch, heads, self._dims[1], dtype=torch.float32)
        step = _Step(
            *(tensor.data_ptr() for tensor in (query, key, value, out, *places)),
            batch=batch,
            context=len(places[3]) // batch,
            per_head=heads // self._heads,
            window=window or 0,
            scale=scale,
            softcap=softcap or 0.0,
        )
        self._call(ctypes.byref(self._layer), ctypes.byref(step), torch.get_num_threads())
        return out


def kv_call(blocks: Tensor, scheme: KVScheme, heads: int, dims: tuple[int, int]) -> KVCall | None:
    """The kernel for a layer with these (key, value) dims, or None: not on this host, or its
    channel groups do not end where the kernel's vectors do."""
    dll = library(Feature.KV) if blocks.is_cpu else None
    size = dims[1] // channel_groups(dims[1], VALUE_CHANNELS)
    half = dims[1] // 2 if scheme.bits == 4 else dims[1]
    if dll is None or (size != dims[1] and (size % _LANES or half % _LANES)):
        return None
    return KVCall(dll, blocks, scheme, heads, dims)
