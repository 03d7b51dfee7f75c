"""What training computes in: bfloat16 products over float32 parameters where hardware has them."""

from __future__ import annotations

import torch


def computing(device: torch.device | str) -> torch.autocast:
    """Autocast to bfloat16 on CUDA and on processors with bfloat16 dot products, else nothing."""
    kind = torch.device(device).type
    fast = kind == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast)
