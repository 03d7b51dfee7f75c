"""Speculative sampling gives the target's distribution: enumerated exactly, and sampled."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateway.engine.acceptance import distributions, draw, judge
from gateway.engine.base import SamplingParams
from gateway.engine.host_acceptance import Shares, judge_row

from .chi_square import chi_square_tail

VOCAB, PARTS = 4, 8
GRID = 840  # a multiple of 1 … 8: every threshold of eighths lies between two of its midpoints
MIDPOINTS = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID


@st.composite
def eighths(draw: st.DrawFn) -> list[int]:
    """How `PARTS` eighths are shared out over the vocabulary."""
    cuts = sorted(draw(st.lists(st.integers(0, PARTS), min_size=VOCAB - 1, max_size=VOCAB - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, PARTS], strict=True)]


def outcome(
    p: list[int], q: list[int] | None, token: int, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """`judge` of one drafted token for every row of `uniform` [n, 2]."""
    n = len(uniform)
    after = [0] * (VOCAB - 1) + [PARTS]
    target = (torch.tensor([p, after]) / PARTS).expand(n, 2, VOCAB)
    draft = None if q is None else (torch.tensor(q) / PARTS).expand(n, 1, VOCAB)
    tokens = torch.full((n, 1), token)
    return judge(target, draft, tokens, torch.ones(n, dtype=torch.long), uniform)


def enumerated(p: list[int], q: list[int] | None, token: int) -> tuple[Fraction, list[Fraction]]:
    """Chance that the drafted token is kept, and the distribution of the one in its place."""
    half = torch.full_like(MIDPOINTS, 0.5)
    kept, following = outcome(p, q, token, torch.stack([MIDPOINTS, half], 1))
    assert (following[kept == 1] == VOCAB - 1).all()  # what the target says after the draft
    chance = Fraction(int(kept.sum()), GRID)
    if chance == 1:
        return chance, [Fraction(0)] * VOCAB
    late = torch.full_like(MIDPOINTS, float(MIDPOINTS[-1]))
    kept, following = outcome(p, q, token, torch.stack([late, MIDPOINTS], 1))
    assert not kept.any()
    counts = torch.bincount(following, minlength=VOCAB).tolist()
    return chance, [Fraction(count, GRID) for count in counts]


@settings(deadline=None, max_examples=60)
@given(eighths(), eighths())
def test_what_comes_out_is_distributed_as_the_target(p: list[int], q: list[int]) -> None:
    total = [Fraction(0)] * VOCAB
    for token in range(VOCAB):
        if not q[token]:
            continue
        drawn = Fraction(q[token], PARTS)
        chance, instead = enumerated(p, q, token)
        total[token] += drawn * chance
        for other in range(VOCAB):
            total[other] += drawn * (1 - chance) * instead[other]
    assert total == [Fraction(part, PARTS) for part in p]


@settings(deadline=None, max_examples=60)
@given(eighths(), st.integers(0, VOCAB - 1))
def test_a_certain_draft_leaves_the_target_distributed_as_it_is(p: list[int], token: int) -> None:
    chance, instead = enumerated(p, None, token)
    assert chance == Fraction(p[token], PARTS)
    total = [(1 - chance) * share for share in instead]
    total[token] += chance
    assert total == [Fraction(part, PARTS) for part in p]


@pytest.mark.parametrize("certain", [True, False])
@settings(deadline=None, max_examples=12)
@given(p=eighths(), q=eighths())
def test_on_the_host_the_same_is_kept_and_drawn(certain: bool, p: list[int], q: list[int]) -> None:
    target = [shares(p), shares([0] * (VOCAB - 1) + [PARTS])]
    grid = MIDPOINTS[::40].tolist()
    for token in range(VOCAB):
        if not certain and not q[token]:
            continue
        for uniform in product(grid[::3], grid):
            numbers = iter(uniform)
            found = judge_row(
                lambda index: target[index],
                None if certain else [shares(q)],
                [token],
                VOCAB,
                lambda numbers=numbers: next(numbers),  # type: ignore[misc]
            )
            tensor = torch.tensor([uniform], dtype=torch.float64)
            good, following = outcome(p, None if certain else q, token, tensor)
            assert found == [*[token] * int(good), int(following)]


def shares(parts: list[int]) -> Shares:
    """All of it, or without the tokens that have none."""
    weights = np.array(parts, dtype=np.float32)
    ids = np.flatnonzero(weights)
    if len(ids) == len(weights):
        return Shares(None, weights, float(PARTS))
    return Shares(ids, weights[ids], float(PARTS))


def test_runs_of_three_tokens_are_distributed_as_the_targets() -> None:
    """Chi-square over all 64 runs; every distribution depends on the tokens before it."""
    generator = torch.Generator().manual_seed(11)
    count, length = 40_000, 3
    prefixes = [run for n in range(length + 1) for run in product(range(VOCAB), repeat=n)]
    number = {run: i for i, run in enumerate(prefixes)}

    def table() -> Tensor:
        return torch.softmax(torch.randn(len(prefixes), VOCAB, generator=generator) * 1.5, -1)

    p, q = table(), table()

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def rows_of(runs: list[tuple[int, ...]]) -> Tensor:
        return torch.tensor([number[run] for run in runs])

    runs: list[tuple[int, ...]] = [()] * count
    target, draft, drafted = [], [], []
    for _ in range(length):
        rows = rows_of(runs)
        target.append(p[rows])
        draft.append(q[rows])
        drafted.append(draw(q[rows], uniform(count)))
        runs = [(*run, int(t)) for run, t in zip(runs, drafted[-1].tolist(), strict=True)]
    target.append(p[rows_of(runs)])
    counts = torch.randint(1, length + 1, (count,), generator=generator)  # ragged drafts
    kept, following = judge(
        torch.stack(target, 1),
        torch.stack(draft, 1),
        torch.stack(drafted, 1),
        counts,
        uniform(count, length + 1),
    )
    ends = zip(runs, kept.tolist(), following.tolist(), strict=True)
    out = [(*run[:good], last) for run, good, last in ends]
    for n in range(1, length):  # what is shorter goes on by plain sampling
        more = draw(p[rows_of([run[:n] for run in out])], uniform(count)).tolist()
        out = [(*run, t) if len(run) == n else run for run, t in zip(out, more, strict=True)]
    cells = list(product(range(VOCAB), repeat=length))
    expected = [
        float(np.prod([p[number[run[:i]], run[i]] for i in range(length)])) for run in cells
    ]
    seen = [run[:length] for run in out]
    observed = [seen.count(run) for run in cells]
    assert chi_square_tail(observed, expected) > 1e-4
    assert chi_square_tail(observed, list(np.roll(expected, 1))) < 1e-9  # it would notice


@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.05, 3.0),
    st.sampled_from([0, 1, 3, 40]),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
    st.integers(0, 10_000),
)
def test_distributions_are_those_of_the_definition(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    params = SamplingParams(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)) * 3
    found = distributions(logits, [params, SamplingParams(1, temperature=1.0)])
    assert torch.allclose(found.sum(-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(found[1], torch.softmax(logits[1], -1), atol=1e-6)
    line = Shares.of(logits[0].numpy(), params)
    assert np.abs(line.whole(32) - found[0].numpy()).max() < 1e-6
    assert [line.chance(i) for i in range(32)] == pytest.approx(found[0].tolist(), abs=1e-6)
    exact = naive(logits[0].double().numpy(), params)
    assert np.abs(found[0].numpy() - exact).sum() < 1e-3 or near_a_border(logits[0], params)


def naive(line: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, then top-k, then the nucleus and min-p of what is left, in float64."""
    weights = np.exp((line - line.max()) / params.temperature)
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0
    probs = weights / weights.sum()
    before = np.cumsum(probs[order]) - probs[order]
    out = np.zeros(len(line), dtype=bool)
    out[order[before >= params.top_p]] = True
    out |= probs < params.min_p * probs.max()
    out[order[0]] = False
    probs[out] = 0
    return probs / probs.sum()


def near_a_border(line: Tensor, params: SamplingParams) -> bool:
    """Whether a cut falls so near a token that rounding decides."""
    probs = naive(line.double().numpy(), SamplingParams(1, temperature=params.temperature))
    sums = np.cumsum(np.sort(probs)[::-1])
    ratios = probs / probs.max()
    return bool(
        np.abs(sums - params.top_p).min() < 1e-5 or np.abs(ratios - params.min_p).min() < 1e-5
    )
