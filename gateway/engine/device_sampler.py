"""Picking the tokens of a batch on an accelerator, whose host does not wait for them.

The same rule as `sampler.pick`, as operations on the whole batch whose shapes the host knows: none
makes it wait. Rows whose logits are adjusted on the host upload what they need first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gateway.engine.base import SamplingParams
from gateway.engine.sampler import COLDEST, RowState

_NO_CUT = 2.0  # of top_p: 1 could lose the last tokens to rounding


def upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` on `device`, without waiting for what runs there."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def pick_on_device(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """The next token of every row, int64 [rows], of fp32 [rows, vocab], which stays as it is."""
    adjusted = logits
    if any(row.adjusted for row in rows):
        adjusted = logits.clone()
        for index, row in enumerate(rows):
            if row.adjusted:
                row.adjust(adjusted[index])
    tokens = adjusted.argmax(-1)
    if any(row.random for row in rows):
        drawn = _draw(adjusted, rows)
        tokens = torch.where(drawn < 0, tokens, drawn)
    return tokens


def _draw(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Random rows' tokens, -1 for the others, int64 [rows]."""
    vocab = logits.shape[1]
    knobs = upload(
        [
            [max(row.params.temperature, COLDEST) for row in rows],
            [row.draw() if row.random else -1.0 for row in rows],
            *_limits([row.params for row in rows], vocab),
        ],
        torch.float64,
        logits.device,
    )[:, :, None]
    cut = any(row.random and row.cut for row in rows)
    weights, uniform = _weigh(logits, knobs[0], knobs[2:] if cut else None), knobs[1]
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(sums, target, right=True)
    return torch.where(uniform < 0, -1, found)[:, 0]


def weigh(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What tokens are drawn in proportion to, fp32 as `logits` [rows, vocab]; 0: cut off."""
    heat = [max(p.temperature, COLDEST) for p in params]
    knobs = upload([heat, *_limits(params, logits.shape[1])], torch.float64, logits.device)
    return _weigh(logits, knobs[0, :, None], knobs[1:, :, None])


def _limits(params: Sequence[SamplingParams], vocab: int) -> list[list[float]]:
    """Top-k, top-p and min-p of every row, such that what is off cuts nothing."""
    return [
        [p.top_k or vocab for p in params],
        [p.top_p if p.top_p < 1.0 else _NO_CUT for p in params],
        [p.min_p for p in params],
    ]


def _weigh(logits: Tensor, heat: Tensor, limits: Tensor | None) -> Tensor:
    """See `weigh`; `heat` is float64 [rows, 1], `limits` [3, rows, 1] or None: none."""
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    best, colder = logits.amax(-1, keepdim=True), heat.float().reciprocal()
    weights = torch.exp((logits - best) * colder)
    if limits is None:
        return weights
    order = logits.sort(-1, descending=True).values
    kept = _kept(logits, order, torch.exp((order - best) * colder), *limits[:2])
    return weights.where(kept & (weights >= limits[2].float()), 0.0)


def _kept(logits: Tensor, order: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """bool [rows, vocab]: what top-k and the nucleus, both [rows, 1], leave; see `sampler`.

    Args:
        order: the logits, falling; `weights` are in proportion to their probabilities.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    top_k = top_k.long().clamp(1, order.shape[1])
    nucleus = torch.searchsorted(sums, top_p * sums.gather(1, top_k - 1)) + 1
    count = torch.minimum(nucleus, top_k)
    least = order.gather(1, count - 1)
    above, equal = logits > least, logits == least
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))
