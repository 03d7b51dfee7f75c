"""Speculative sampling: which drafted tokens a target keeps, so that what comes out has exactly the
target's distribution (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023,
https://arxiv.org/abs/2302.01318).

A token x drawn from q is kept with probability min(1, p(x) / q(x)); the first one that is not is
drawn anew from max(0, p − q), normalised; after a whole draft one more comes from p. p and q are
the distributions that would be sampled from, temperature and cut-offs included. Pure tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gateway.engine import device_sampler
from gateway.engine.base import SamplingParams
from gateway.engine.sampler import weigh


def distributions(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What the sampler draws from: probabilities, fp32 [rows, vocab], each row by its parameters.

    Args:
        logits: fp32 [rows, vocab], penalties and bias applied; temperatures are above 0.
    """
    if logits.device.type == "cpu":
        lines = zip(logits.numpy(), params, strict=True)
        weights = torch.from_numpy(np.stack([_weights(line, p) for line, p in lines]))
    else:
        weights = device_sampler.weigh(logits, params)
    return weights / weights.sum(-1, keepdim=True)


def _weights(line: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float32]:
    ids, weights = weigh(line, params)
    if ids is None:
        return weights
    whole = np.zeros_like(line)
    whole[ids] = weights
    return whole


def judge(
    target: Tensor, draft: Tensor | None, tokens: Tensor, counts: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row keeps, and the token that follows them.

    Args:
        target: p, fp32 [rows, k + 1, vocab]: before each drafted token, and after the last.
        draft: q, fp32 [rows, k, vocab]; None: every token was proposed with certainty.
        tokens: the drafts, int64 [rows, k]; of row i the first counts[i].
        counts: int64 [rows].
        uniform: float64 [rows, k + 1] in [0, 1), independent of the drafts.

    Returns:
        (kept, following), int64 [rows] each.
    """
    rows, most = tokens.shape
    each = torch.arange(rows, device=tokens.device)
    p = target[:, :most].gather(2, tokens[..., None])[..., 0].double()
    q: Tensor | float = 1.0
    if draft is not None:
        q = draft.gather(2, tokens[..., None])[..., 0].double()
    drafted = torch.arange(most, device=tokens.device) < counts[:, None]
    passed = (uniform[:, :most] * q < p) & drafted
    kept = passed.long().cumprod(1).sum(1)
    rejected, at = kept < counts, kept.clamp(max=most - 1)
    rest = target[each, kept].double()
    if draft is None:
        certain = torch.zeros_like(rest).scatter_(1, tokens[each, at, None], 1.0)
    else:
        certain = draft[each, at].double()
    residual = (rest - certain).clamp_(min=0.0)
    # By rounding alone, p may lie below q everywhere: then p ≈ q, and p itself is what is left.
    use = rejected & (residual.sum(1) > 0)
    return kept, draw(torch.where(use[:, None], residual, rest), uniform[:, most])


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 [rows]: tokens by inverse transform sampling from `weights` [rows, vocab], which need
    not add up to 1; `uniform` is float64 [rows] in [0, 1)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Rounding at the very end must not reach past the last possible token.
    wanted = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
