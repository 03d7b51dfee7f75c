"""Linears of one input solved as one, for devices that want few large pieces of work.

Where a method treats every row by itself, the stacked weights of linears that share an input
(query, key and value; gate and up) cost as many steps as one of them, and one factorization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from compressors.apply import Statistics, compress_linear
from compressors.model import weight_of
from compressors.plan import LinearPlan
from compressors.registry import METHODS
from compressors.tensor import Grouped, LinearForm


def compress_together(
    block: nn.Module, rows: Sequence[LinearPlan], statistics: Statistics
) -> dict[str, LinearForm]:
    """Forms of the linears `rows` of a loaded block, which share one input, by name.

    Empty when they cannot be solved as one: each has to be by itself.

    Raises:
        ValueError: a weight or a statistic is not finite.
    """
    steps = rows[0].steps
    if len(rows) < 2 or len(steps) != 1 or not METHODS[steps[0].method].by_row:
        return {}
    if any(row.steps != steps for row in rows):
        return {}
    weights = [weight_of(block.get_submodule(row.name)) for row in rows]
    whole = compress_linear(
        torch.cat([weight.float() for weight in weights]),
        steps,
        statistics,
        rank=0,
        dtype=weights[0].dtype,
    )
    if not isinstance(whole, Grouped):
        return {}
    ends = list(accumulate(len(weight) for weight in weights))
    return {
        row.name: replace(
            whole,
            codes=whole.codes[end - len(weight) : end],
            scales=whole.scales[end - len(weight) : end],
            zeros=whole.zeros[end - len(weight) : end],
        )
        for row, weight, end in zip(rows, weights, ends, strict=True)
    }


def moved(form: LinearForm, device: torch.device | str) -> LinearForm:
    """The form with every tensor on `device`."""
    assert is_dataclass(form)
    changes: dict[str, Any] = {}
    for name in (field.name for field in fields(form)):
        value = getattr(form, name)
        if isinstance(value, Tensor):
            changes[name] = value.to(device)
        elif isinstance(value, LinearForm):
            changes[name] = moved(value, device)
    result: LinearForm = replace(form, **changes)
    return result
