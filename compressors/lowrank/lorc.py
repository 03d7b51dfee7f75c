"""Low-rank correction of a compressed layer's error (LoRC, ZeroQuant-V2, arXiv:2303.08302).

With E = W − Ŵ the layer computes Ŵx + L(Rx), L and R the best factors of E of some rank. Without
text they are those of E's SVD, as in the paper. With the inputs' second moments E is whitened
first, as in LQER (arXiv:2402.02446) and, exactly, QERA (arXiv:2410.06040): then ‖(E − LR)X‖ is
least, not ‖E − LR‖; that is SVD-LLM's problem (see `svd`) for E in the place of W. The factors are
codes of 8 bits with one scale per row. Pure tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.forms.corrected import Corrected
from compressors.gram import Gram, accumulate, empty
from compressors.lowrank import svd
from compressors.quantize import rtn
from compressors.tensor import Grouped, LinearForm, LowRank

__all__ = ["accumulate", "empty", "solve"]


def solve(weight: Tensor, statistic: Gram | None, *, form: LinearForm, rank: int) -> LinearForm:
    """`form`, which stands for weight [N, K] (float32), with its error corrected at `rank`.

    The rank is at most the layer's own; a layer so small that factors hold as many parameters as
    its weight is returned as it is.

    Args:
        statistic: of the inputs, if text was seen.

    Raises:
        ValueError: the statistic is not finite.
    """
    n, k = weight.shape
    if rank * (n + k) >= n * k:
        return form
    error = weight - form.dense().to(weight.device)
    known = statistic or Gram(torch.eye(k, device=weight.device), 1)
    factors = svd.solve(error, known, rank=rank)
    left, right = (_codes(factor.dense()) for factor in (factors.left, factors.right))
    return Corrected(form, LowRank(left, right))


def _codes(factor: Tensor) -> Grouped:
    return rtn.solve(factor, bits=8, group=factor.shape[1], symmetric=True)
