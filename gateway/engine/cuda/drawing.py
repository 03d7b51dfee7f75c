# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: PLR0917 (a kernel has one parameter per tensor and size)
"""Drawing tokens from a batch's logits in one Triton kernel, a row per program.

`device_sampler` says the same in torch operations, where top-k and the nucleus sort the whole
vocabulary. Nothing is sorted here: the least logit that stays is searched for among the ordered
integers that fp32 numbers are, nine parts at a time, which takes eleven passes over a row that
lies in the cache (the idea of FlashInfer's samplers, https://arxiv.org/abs/2501.01005).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_WAYS = 8
_BLOCK = 4096
_WARPS = 16
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _key(x):
    """int32 in the order of the fp32 numbers."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight_of(key, best, colder):
    """The weight of the logit whose key this is."""
    bits = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.int32)
    return tl.exp((bits.to(tl.float32, bitcast=True) - best) * colder)


@triton.jit
def _from(
    line, V, best, colder, low, step, MASS: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """fp32 [WAYS]: weight, or number, of the logits whose keys are low + (i + 1) · step or more."""
    marks = low + (tl.arange(0, WAYS) + 1).to(tl.int64) * step
    marks = tl.minimum(marks, 2**31 - 1).to(tl.int32)
    sums = tl.zeros([WAYS, BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(line + columns, columns < V, other=float("-inf"))
        weight = tl.exp((x - best) * colder) if MASS else tl.where(columns < V, 1.0, 0.0)
        sums += tl.where(_key(x)[None, :] >= marks[:, None], weight[None, :], 0.0)
    return tl.sum(sums, 1)


@triton.jit
def _above(line, V, best, colder, key, MASS: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """Weight, or number, of the logits above a key."""
    found = _from(line, V, best, colder, key, 1, MASS, WAYS, BLOCK)
    return tl.sum(tl.where(tl.arange(0, WAYS) == 0, found, 0.0), 0)


@triton.jit
def _search(
    line, V, best, colder, goal, MASS: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key (int64) that `goal` or more, by weight or number, reach."""
    low = tl.full([], _LOWEST, tl.int64)
    high = _key(best).to(tl.int64) + 1
    while high - low > 1:
        step = tl.maximum((high - low) // (WAYS + 1), 1)
        found = _from(line, V, best, colder, low, step, MASS, WAYS, BLOCK)
        reached = tl.sum((found >= goal).to(tl.int64), 0)
        high = tl.where(reached == WAYS, high, tl.minimum(high, low + (reached + 1) * step))
        low += reached * step
    return low


@triton.jit
def _best(line, V, BLOCK: tl.constexpr):
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for at in range(0, V, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(line + columns, columns < V, other=float("-inf")))
    return tl.max(most, 0)


@triton.jit
def _cut(line, V, best, colder, top_k, top_p, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """(key, room): top-k and the nucleus leave all above the key, and the first `room` at it."""
    least = tl.full([], _LOWEST, tl.int64)
    room = tl.full([], 0.0, tl.float32)
    if top_k < V:
        least = _search(line, V, best, colder, top_k, False, WAYS, BLOCK)
        room = top_k - _above(line, V, best, colder, least, False, WAYS, BLOCK)
    if top_p < 1.0:
        goal = _above(line, V, best, colder, least, True, WAYS, BLOCK)
        if top_k < V:
            goal += room * _weight_of(least, best, colder)
        goal *= top_p
        inner = _search(line, V, best, colder, goal, True, WAYS, BLOCK)
        missing = goal - _above(line, V, best, colder, inner, True, WAYS, BLOCK)
        need = tl.maximum(tl.ceil(missing / _weight_of(inner, best, colder)), 1.0)
        room = tl.where(inner == least, tl.minimum(room, need), room)
        room = tl.where(inner > least, need, room)
        least = tl.maximum(inner, least)
    return least, room


@triton.jit
def _weigh(line, V, best, colder, least, room, min_p, BLOCK: tl.constexpr):
    """What all that is kept weighs."""
    sums = tl.zeros([BLOCK], tl.float32)
    equals = tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(line + columns, columns < V, other=float("-inf"))
        key, weight = _key(x), tl.exp((x - best) * colder)
        sums += tl.where((key > least) & (weight >= min_p), weight, 0.0)
        equals += tl.where(key == least, 1.0, 0.0)
    total = tl.sum(sums, 0)
    held = tl.minimum(room, tl.sum(equals, 0))
    if held > 0:
        tied = _weight_of(least, best, colder)
        total += tl.where(tied >= min_p, held * tied, 0.0)
    return total


@triton.jit
def _invert(line, V, best, colder, least, room, min_p, target, BLOCK: tl.constexpr):
    """The first column at which what is kept adds up to more than `target`; -1: nowhere."""
    before = tl.full([], 0.0, tl.float64)
    seen = tl.full([], 0, tl.int32)
    token = tl.full([], -1, tl.int32)
    at = tl.full([], 0, tl.int32)
    while (at < V) & (token < 0):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(line + columns, columns < V, other=float("-inf"))
        key, weight = _key(x), tl.exp((x - best) * colder)
        equal = (key == least).to(tl.int32)
        kept = (key > least) | ((equal > 0) & (tl.cumsum(equal, 0) + seen <= room))
        weight = tl.where(kept & (weight >= min_p), weight, 0.0)
        whole = tl.sum(weight, 0).to(tl.float64)
        if before + whole > target:
            sums = tl.cumsum(weight.to(tl.float64), 0) + before
            hit = tl.min(tl.where((sums > target) & (weight > 0.0), columns, V), 0)
            token = tl.where(hit < V, hit, -1)
        before += whole
        seen += tl.sum(equal, 0)
        at += BLOCK
    return token


@triton.jit
def _draw(
    logits_ptr,
    knobs_ptr,
    tokens_ptr,
    stride,
    rows,
    V,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    uniform = tl.load(knobs_ptr + rows + row)
    if uniform >= 0:
        line = logits_ptr + row * stride
        colder = 1.0 / tl.load(knobs_ptr + row).to(tl.float32)
        top_k = tl.load(knobs_ptr + 2 * rows + row).to(tl.float32)
        top_p = tl.load(knobs_ptr + 3 * rows + row).to(tl.float32)
        min_p = tl.load(knobs_ptr + 4 * rows + row).to(tl.float32)
        best = _best(line, V, BLOCK)
        least, room = _cut(line, V, best, colder, top_k, top_p, WAYS, BLOCK)
        total = _weigh(line, V, best, colder, least, room, min_p, BLOCK)
        target = uniform * total.to(tl.float64)
        token = _invert(line, V, best, colder, least, room, min_p, target, BLOCK)
        # Rounding of the sums may leave nobody, once in millions: then it stays the best.
        if token >= 0:
            tl.store(tokens_ptr + row, token.to(tl.int64))


def draw(logits: Tensor, knobs: Tensor, tokens: Tensor) -> None:
    """Replace the tokens of random rows by drawn ones.

    Args:
        logits: fp32 [rows, vocab], rows without gaps.
        knobs: float64 [5, rows]: temperature, uniform number (negative: not random), top-k (vocab:
            off), top-p (above 1: off), min-p.
        tokens: int64 [rows], the best of each row; written to.
    """
    rows, vocab = logits.shape
    _draw[(rows,)](
        logits,
        knobs,
        tokens,
        logits.stride(0),
        rows,
        vocab,
        WAYS=_WAYS,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
