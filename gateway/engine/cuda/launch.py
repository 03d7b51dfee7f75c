# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Programmatic dependent launch: a kernel's programs start while the one before still runs.

They load what that one does not write (weights, norms, tables), then wait for it. From Hopper on;
elsewhere a kernel is launched as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """Let the next kernel start; wait for the one before.

    In this order, so that kernels start as soon as there is room for them, also over a small one
    that waits itself. Whatever is read before this call must therefore be older than the step.
    """
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


def early(rows: Tensor) -> dict[str, Any]:
    """Arguments of a launch over `rows` whose kernel calls `await_inputs` and takes `EARLY`.

    For one row only: between cuBLAS's kernels, which do not take part, it costs more than it gives.
    """
    index = rows.device.index if rows.is_cuda else None
    if index is None or rows.shape[0] > 1 or not _able(index):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def _able(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] >= 9
