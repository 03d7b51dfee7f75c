"""The thin runner of CUDA devices; `runners.THIN` names it."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from gateway.engine.attention import Pool
from gateway.engine.model import Model
from gateway.engine.runners import StepRunner

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(model: Model, pool: Pool, max_batch: int) -> StepRunner | None:
    """A runner of the model's parts; None where they are not known, where Triton is missing, or
    where keys and values are quantized."""
    if model.decoder is None or model.layout.kv is not None or find_spec("triton") is None:
        return None
    if model.layout.dtype not in _DTYPES:
        return None
    from gateway.engine.cuda.step import CudaRunner

    return CudaRunner(model, model.decoder, pool, max_batch)
