"""Picking the tokens of a batch on an accelerator, whose host does not wait for them.

The same rule as `sampler.pick`, as operations on the whole batch whose shapes the host knows: none
makes it wait. Rows whose logits are adjusted on the host upload what they need first. On CUDA one
kernel draws (`cuda.drawing`), once it was seen to draw what the operations here do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from gateway.engine.base import SamplingParams
from gateway.engine.sampler import COLDEST, RowState

log = logging.getLogger(__name__)

# Of fp32 logits [rows, vocab], knobs, and int64 [rows], the best tokens: replaces random rows'.
# Knobs are float64 [5, rows]: temperature, uniform number (negative: not random), and `_limits`.
Drawing = Callable[[Tensor, Tensor, Tensor], None]
# A row's argmax is one program's work in torch, 28 µs of a device for 128,256 logits.
_FEW, _PARTS, _WIDE = 8, 64, 1 << 15
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
    tokens = best(adjusted)
    if any(row.random for row in rows):
        draw = kernel() if logits.is_cuda else None
        (draw or draw_by_operations)(adjusted, _knobs(rows, logits), tokens)
    return tokens


def best(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of [rows, vocab]; of a few wide rows in parts."""
    rows, vocab = logits.shape
    if not logits.is_cuda or rows > _FEW or vocab < _WIDE or vocab % _PARTS:
        return logits.argmax(-1)
    most, where = logits.reshape(rows, _PARTS, -1).max(-1)
    part = most.argmax(-1, keepdim=True)
    return (where.gather(1, part) + part * (vocab // _PARTS)).squeeze(1)


def _knobs(rows: Sequence[RowState], logits: Tensor) -> Tensor:
    values = [
        [max(row.params.temperature, COLDEST) for row in rows],
        [row.draw() if row.random else -1.0 for row in rows],
        *_limits([row.params for row in rows], logits.shape[1]),
    ]
    return upload(values, torch.float64, logits.device)


def draw_by_operations(logits: Tensor, knobs: Tensor, tokens: Tensor) -> None:
    """A `Drawing` for any device."""
    knobs = knobs[:, :, None]
    uniform = knobs[1]
    weights = _weigh(logits, knobs[0], knobs[2:])
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(sums, target, right=True)[:, 0]
    tokens.copy_(torch.where(uniform[:, 0] < 0, tokens, found))


@cache
def kernel() -> Drawing | None:
    """The drawing kernel of CUDA; None where it does not run or draws otherwise. Compiles it when
    called first: do that before anyone waits for a token."""
    try:
        found: Drawing = import_module("gateway.engine.cuda.drawing").draw
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(8, 5000, dtype=torch.float32, generator=generator)
        logits = (3 * logits).round(decimals=1).cuda()
        heat, uniform = [0.5, 1.0] * 4, torch.rand(8, generator=generator).tolist()
        cuts = [[5000, 9, 5000, 40] * 2, [_NO_CUT, _NO_CUT, 0.9, 0.5] * 2, [0.0] * 6 + [0.1] * 2]
        knobs = torch.tensor([heat, uniform, *cuts], dtype=torch.float64).cuda()
        ours, plain = logits.argmax(-1), logits.argmax(-1)
        found(logits, knobs, ours)
        draw_by_operations(logits, knobs, plain)
    except Exception:  # whatever Triton or a driver raises: there is another way
        log.warning("tokens are drawn without the kernel for it", exc_info=True)
        return None
    if not torch.equal(ours, plain):
        log.warning("the drawing kernel draws other tokens than it should: it is not used")
        return None
    return found


def weigh(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What tokens are drawn in proportion to, fp32 as `logits` [rows, vocab]; 0: cut off."""
    heat = [max(p.temperature, COLDEST) for p in params]
    cuts = any(p.top_k or p.top_p < 1.0 or p.min_p for p in params)
    limits = _limits(params, logits.shape[1]) if cuts else []
    knobs = upload([heat, *limits], torch.float64, logits.device)[:, :, None]
    return _weigh(logits, knobs[0], knobs[1:] if cuts else None)


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
