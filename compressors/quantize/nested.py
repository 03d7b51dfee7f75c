"""Two precisions in one weight: a 4-bit child, and a 4-bit residual that makes the parent.

One stored weight for several precisions is the idea of Any-Precision LLM (arXiv:2402.10517), which
grows the codes from those of the smallest model, of MatQuant (arXiv:2502.06786) and of NestedFP
(arXiv:2506.02024). Here, too, the child comes first: it is exactly what the base method gives at 4
bits (cutting bits off an 8-bit parent instead gives a child no better than round-to-nearest). Then
what is left, R = W − Ŵ₄, is quantized to 4 bits in steps of an eighth of the child's (see
`forms.nested` for why not a sixteenth): column by column with GPTQ's repair (arXiv:2210.17323, eqs.
2 and 3) when the inputs are known, else to nearest. Pure tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressors.forms.nested import CHILD_BITS, RATIO, Nested
from compressors.gram import Gram, accumulate, empty
from compressors.quantize import gptq, rtn
from compressors.tensor import Grouped

__all__ = ["accumulate", "empty", "solve"]


def solve(
    weight: Tensor,
    statistic: Gram | None,
    *,
    high: Callable[..., Grouped],
    group: int,
    symmetric: bool = False,
    bits: int = 2 * CHILD_BITS,
) -> Nested:
    """Quantize weight [N, K] (float32) at 4 and at `bits` bits at once.

    Args:
        statistic: of the inputs; None for a base that needs none.
        high: the base method's `solve`.

    Raises:
        ValueError: the statistic is not finite.
    """
    assert bits == 2 * CHILD_BITS
    child = high(weight, statistic, bits=CHILD_BITS, group=group, symmetric=symmetric)
    rest = weight - child.dense().to(weight.device)
    scales = child.scales / RATIO
    zeros = torch.full_like(scales, 2.0 ** (CHILD_BITS - 1))
    if statistic is not None:
        grid = (scales, zeros)
        low = gptq.solve(rest, statistic, bits=CHILD_BITS, group=group, grid=grid).codes
    else:
        index = child.group_index()
        low = rtn.encode(rest, scales[:, index], zeros[:, index], CHILD_BITS)
    return Nested(child, low)
