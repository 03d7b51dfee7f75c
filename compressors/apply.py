"""One linear through its steps: float32 weight and statistics in, compressed form out.

Pure tensors; knows how steps stack, not where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressors import gram
from compressors.forms.sparse import Bitmap
from compressors.prune.magnitude import mask_of
from compressors.recipe import Step
from compressors.registry import METHODS
from compressors.tensor import Dense, LinearForm, LowRank, Sparse24

Statistics = Mapping[str, Any]
"""Method name → its statistic of this layer's inputs, for methods that need one."""


def compress_linear(
    weight: Tensor,
    steps: tuple[Step, ...],
    statistics: Statistics,
    *,
    rank: int,
    dtype: torch.dtype,
    given: LinearForm | None = None,
) -> LinearForm:
    """Apply `steps` to weight [N, K] (float32); values left unquantized come out in `dtype`.

    The form lies on the CPU, wherever the weight did. `given` is the form that the weight stands
    for already, where earlier steps made one.

    Raises:
        ValueError: the weight or a statistic is not finite.
    """
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise ValueError("the weight is not finite")
    form: LinearForm = Dense(weight) if given is None else given
    for step in steps:
        solve, statistic = METHODS[step.method].load(), statistics.get(step.method)
        if step.kind == "lowrank":
            form = solve(weight, statistic, rank=rank)
        elif step.kind == "sparse":
            form = solve(weight, statistic, pattern=step.pattern)
        elif step.kind == "correct":
            form = solve(weight, statistic, form=form, rank=step.rank)
        else:
            form = _quantize(form, weight, step, statistic)
    return form.stored_as(dtype)


def _quantize(form: LinearForm, weight: Tensor, step: Step, statistic: Any) -> LinearForm:
    if isinstance(form, Dense):
        return _solve(form.weight, step, statistic)
    if isinstance(form, LowRank):
        right = _solve(form.right.dense(), step, statistic)
        if statistic is not None:  # the left factor's inputs are what the right one gives
            statistic = gram.project(statistic, right.dense())
        return LowRank(_solve(form.left.dense(), step, statistic), right)
    assert isinstance(form, (Sparse24, Bitmap))
    if statistic is None:
        return replace(form, values=_solve(form.values.dense(), step, None))
    # Jointly with the pruning: what is dropped is repaired like a rounding error, unless the
    # pruning has repaired it and moved the weights that stay.
    mask, pruned = mask_of(form), form.dense()
    full = weight if torch.equal(pruned, weight * mask) else pruned
    return replace(form, values=_solve(full, step, statistic, form.values.shape[1], mask=mask))


def _solve(
    weight: Tensor, step: Step, statistic: Any, columns: int | None = None, **extra: Any
) -> LinearForm:
    solve = METHODS[step.method].load()
    if step.base:
        extra["high"] = METHODS[step.base].load()
    if step.act_order:
        extra["act_order"] = True
    form: LinearForm = solve(
        weight,
        statistic,
        bits=step.bits,
        group=step.group_columns(columns or weight.shape[1]),
        symmetric=step.symmetric,
        **extra,
    )
    return form
