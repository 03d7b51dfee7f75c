"""Quantization-aware training with a straight-through rounding: LLM-QAT (arXiv:2305.17888).

The forward pass computes with codes q = clip(⌊w/s + z⌉, 0, 2ᵇ − 1) of a weight w that is kept in
full precision, Ŵ = s (q − z) (section 3.2, eqs. 1 and 3); the backward pass takes the rounding for
the identity (Bengio et al. 2013, arXiv:1308.3432). Where LLM-QAT recomputes s from the range of w,
here s and z are learned with it (LSQ, arXiv:1902.08153, eq. 3, which falls out of the rounding's
identity; EfficientQAT, arXiv:2407.11062, section 3.2), since below four bits the range of a group
is a bad grid. Training starts from GPTQ's codes: each weight at the point of its code's cell that
is nearest to the dense weight. The loss is the divergence from the dense model on text that the
dense model made (section 3.1), beside the calibration text. Pure tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressors.distill import kl
from compressors.distill.objective import Objective
from compressors.distill.trainable import TrainedWeight, dequantize
from compressors.quantize.rtn import encode, round_scale
from compressors.tensor import Grouped


def objective() -> Objective:
    """How it is trained: as a healed level is."""
    return kl.objective()


# A weight that starts on the border of its cell would change its code at the first step.
_INSIDE = 0.45


class FakeQuantized(TrainedWeight):
    """A weight that is trained through its own quantization.

    Args:
        weight: the dense weight [N, K], float.
        start: the codes and grids to start from, of that weight.
    """

    scales: Tensor
    zeros: Tensor
    unit: Tensor
    index: Tensor | None

    def __init__(self, weight: Tensor, start: Grouped) -> None:
        super().__init__()
        self.bits, self.group = start.bits, start.group
        index = start.group_index()
        s, z = start.scales[:, index], start.zeros[:, index]
        offset = (weight.float() / s + z - start.codes).clamp_(-_INSIDE, _INSIDE)
        # In units of the layer's mean scale, so that one learning rate fits every width of code.
        self.register_buffer("unit", start.scales.float().mean())
        self.latent = nn.Parameter(s * (start.codes + offset - z) / self.unit)
        self.register_buffer("scales", start.scales.detach().float())
        self.register_buffer("zeros", start.zeros.detach().float())
        self.register_buffer("index", index if start.perm is not None else None)
        self.perm = start.perm
        self.gain = nn.Parameter(torch.ones_like(self.scales))
        self.shift = None if start.symmetric else nn.Parameter(torch.zeros_like(self.zeros))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros as they are now, each [N, G]."""
        zeros = self.zeros if self.shift is None else self.zeros + self.shift
        return self.scales * self.gain, zeros

    def _wide(self, values: Tensor) -> Tensor:
        """[N, G] → what broadcasts against the grouped weight, or [N, K]."""
        if self._whole:
            return values.unsqueeze(-1)
        index = self.index
        if index is None:
            index = torch.arange(self.latent.shape[1], device=values.device) // self.group
        return values.index_select(1, index)

    @property
    def _whole(self) -> bool:
        return self.index is None and self.latent.shape[1] % self.group == 0

    def weight(self) -> Tensor:
        n, k = self.latent.shape
        scales, zeros = (self._wide(t) for t in self.grid())
        latent = self.latent * self.unit
        if self._whole:
            latent = latent.view(n, -1, self.group)
        place = latent / scales + zeros
        codes = place + (place.round() - place).detach()
        codes = codes.clamp(0, 2**self.bits - 1)
        return ((codes - zeros) * scales).view(n, k)

    @torch.no_grad()
    def form(self) -> Grouped:
        scales, zeros = self.grid()
        wide_scales, wide_zeros = (
            dequantize(
                torch.ones_like(self.latent),
                t,
                torch.zeros_like(t),
                group=self.group,
                index=self.index,
            )
            for t in (scales, zeros)
        )
        codes = encode(self.latent * self.unit, wide_scales, wide_zeros, self.bits)
        return Grouped(codes, round_scale(scales), zeros.clone(), self.bits, self.group, self.perm)
