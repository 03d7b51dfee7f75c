"""What the pipeline learns of a linear's inputs, and how far off its compressed form is on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressors.registry import METHODS

_SAMPLE_ROWS = 256  # inputs of each layer on which its error is reported
_ROWS_AT_ONCE = 1024
_ERROR_WEIGHTS = 2**20  # compared at once: small pieces stay in the caches


class Observer:
    """Statistics of one input for every method that needs one, and a sample of its rows."""

    def __init__(self, methods: Sequence[str], width: int, device: torch.device | str) -> None:
        modules = {name: METHODS[name].module() for name in methods}
        self._width, self._device = width, device
        # Methods that accumulate the same thing share it.
        shared: dict[Any, Any] = {}
        for module in modules.values():
            if module.accumulate not in shared:
                shared[module.accumulate] = module.empty(width, device)
        self._shared = shared
        self.statistics: Mapping[str, Any] = {
            name: shared[module.accumulate] for name, module in modules.items()
        }
        self.sample: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.sample is None and len(rows):
            self.sample = rows[:: max(1, len(rows) // _SAMPLE_ROWS)][:_SAMPLE_ROWS].float().clone()
        self._accumulate(rows)

    def assume_all_alike(self) -> None:
        """For a linear that no text reached: every input feature is as likely as any other.

        With X = I methods fall back on what they are without data: GPTQ on rounding to nearest,
        Wanda on magnitude, whitened SVD on the plain one.
        """
        for start in range(0, self._width, _ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, self._width))
            eye = torch.nn.functional.one_hot(rows, self._width)
            self._accumulate(eye.to(self._device, torch.float32))

    def _accumulate(self, rows: Tensor) -> None:
        for accumulate, statistic in self._shared.items():
            accumulate(statistic, rows)


def relative_error(weight: Tensor, dense: Tensor, sample: Tensor | None) -> float:
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ on sample rows X, or ‖W−Ŵ‖ / ‖W‖ without one; weights [N, K] float32."""
    step = max(1, _ERROR_WEIGHTS // weight.shape[1]) if weight.is_cpu else weight.shape[0]
    wrong, norm = 0.0, 0.0
    for part, other in zip(torch.split(weight, step), torch.split(dense, step), strict=True):
        error, whole = part - other, part
        if sample is not None:
            error, whole = sample @ error.t(), sample @ whole.t()
        wrong += float(error.square_().sum(dtype=torch.float64))
        norm += float(whole.square().sum(dtype=torch.float64))
    return float((wrong / norm) ** 0.5) if norm else 0.0
