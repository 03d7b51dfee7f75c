"""Sampling: the right distribution, the right cut-offs, independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateway.engine.base import SamplingParams
from gateway.engine.device_sampler import pick_on_device
from gateway.engine.draw import DeviceDraw
from gateway.engine.sampler import RowState, pick, sample, score, weigh


def row(prompt: tuple[int, ...] = (1,), **options: Any) -> RowState:
    return RowState(SamplingParams(max_tokens=9, **options), prompt)


def draws(logits: Tensor, count: int, **options: Any) -> Tensor:
    """How often each token was drawn, [vocab]."""
    state = row(seed=11, **options)
    picked = [sample(logits[None], [state])[0].token for _ in range(count)]
    return torch.bincount(torch.tensor(picked), minlength=logits.shape[0])


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """Pearson's statistic over tokens with probability; the others must not occur."""
    assert int(counts[probs == 0].sum()) == 0
    expected = probs * counts.sum()
    kept = probs > 0
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum())


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, 0.5])


def test_temperature_one_is_the_softmax() -> None:
    # 99.99 % point of chi-square with 5 degrees of freedom
    assert chi_square(draws(LOGITS, 6000, temperature=1.0), torch.softmax(LOGITS, 0)) < 25.7


def test_temperature_scales_the_logits() -> None:
    counts = draws(LOGITS, 6000, temperature=0.5)
    assert chi_square(counts, torch.softmax(LOGITS / 0.5, 0)) < 25.7


def test_top_k_top_p_min_p_renormalise_over_what_is_left() -> None:
    probs = torch.softmax(LOGITS, 0)
    for options, kept in (
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),  # 0.40 + 0.24 reaches 0.6
        ({"min_p": 0.3}, [0, 1, 2]),  # at least 0.3 of the best
    ):
        only = torch.zeros_like(probs)
        only[kept] = probs[kept] / probs[kept].sum()
        assert chi_square(draws(LOGITS, 3000, temperature=1.0, **options), only) < 20


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    st.floats(1e-6, 5),
    st.integers(0, 14),
    st.tuples(st.floats(0.001, 1), st.floats(0, 1)),
    st.integers(0, 2**63),
)
@settings(deadline=None)
def test_a_drawn_token_is_always_a_kept_one(
    logits: list[float], temperature: float, top_k: int, cuts: tuple[float, float], seed: int
) -> None:
    top_p, min_p = cuts
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    values = torch.tensor(logits)
    token = sample(values[None], [row(seed=seed, **options)])[0].token
    better = int((values > values[token]).sum())
    assert better < (top_k or len(logits))
    probs = torch.softmax(values.double() / temperature, 0)
    assert probs[token] >= min_p * probs.max() * 0.999 or better == 0
    assert probs[values > values[token]].sum() <= top_p + 1e-4


def test_a_seeded_row_ignores_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 50)
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    alone = row(**options)
    expected = [sample(step[None], [alone])[0].token for step in logits]
    among = row(**options)
    others = [row(temperature=1.3, seed=1), row(temperature=0.0), row(temperature=1.0, top_k=2)]
    got = [
        sample(
            torch.cat([torch.randn(2, 50), step[None], torch.randn(1, 50)]),
            [*others[:2], among, others[2]],
        )[2].token
        for step in logits
    ]
    assert got == expected
    assert len(set(got)) > 3


def test_unseeded_rows_differ() -> None:
    logits = torch.zeros(64, 1000)
    picked = [s.token for s in sample(logits, [row(temperature=1.0) for _ in range(64)])]
    assert len(set(picked)) > 32


def test_greedy_is_argmax_and_bias_moves_it() -> None:
    assert sample(LOGITS[None], [row(temperature=0.0)])[0].token == 0
    biased = row(temperature=0.0, logit_bias={4: 10.0, 999: 5.0})
    assert sample(LOGITS[None], [biased])[0].token == 4
    banned = row(temperature=1.0, logit_bias={0: -100.0, 1: -100.0}, seed=1)
    assert all(sample(LOGITS[None], [banned])[0].token > 1 for _ in range(50))


def test_presence_and_frequency_follow_the_output_only() -> None:
    flat = torch.tensor([1.0, 0.9, 0.0])
    state = row(prompt=(0, 0), temperature=0.0, presence_penalty=0.2)
    assert [sample(flat[None], [state])[0].token for _ in range(2)] == [0, 1]
    state = row(temperature=0.0, frequency_penalty=0.06)
    assert [sample(flat[None], [state])[0].token for _ in range(4)] == [0, 0, 1, 0]


def test_repetition_penalty_divides_and_multiplies() -> None:
    state = row(prompt=(0, 2), temperature=0.0, repetition_penalty=2.0)
    adjusted = torch.tensor([3.0, 1.0, -1.0])
    state.adjust(adjusted)
    assert adjusted.tolist() == [1.5, 1.0, -2.0]


def test_logprobs_are_of_the_raw_distribution() -> None:
    state = row(temperature=0.3, top_k=1, logit_bias={3: 50.0}, logprobs=2, seed=0)
    got = sample(LOGITS[None], [state])[0]
    raw = torch.log_softmax(LOGITS, 0)
    assert got.token == 3
    assert got.logprob == pytest.approx(float(raw[3]))
    assert [t for t, _ in got.top] == [0, 1]
    assert [p for _, p in got.top] == pytest.approx(raw[:2].tolist())
    assert sample(LOGITS[None], [row(logprobs=0)])[0].top == ()


def test_score_reports_the_given_tokens() -> None:
    logits = torch.stack([LOGITS, -LOGITS])
    got = score(logits, [5, 5], 1)
    expected = torch.log_softmax(logits, -1)
    assert [s.logprob for s in got] == pytest.approx(expected[:, 5].tolist())
    assert [s.top[0][0] for s in got] == [0, 4]


def test_extreme_temperatures_stay_finite() -> None:
    for temperature in (1e-30, 1e30):
        token = sample(LOGITS[None] * 1e4, [row(temperature=temperature, seed=3)])[0].token
        assert 0 <= token < 6
    assert math.isfinite(float(score(LOGITS[None] * 1e4, [4], 0)[0].logprob or 0.0))


def test_uniform_numbers_are_those_of_the_seed_one_by_one() -> None:
    generator = torch.Generator().manual_seed(77)
    plain = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(100)]
    state = row(seed=77)
    assert [state.draw() for _ in range(100)] == plain


@pytest.mark.parametrize("vocab", [3, 600, 5000])
@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
def test_cut_offs_keep_what_a_full_sort_keeps(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # Rounded to quarters of the spread, so that many are equal.
    logits = (4 * torch.randn(vocab, generator=generator)).round() * spread / 4
    order = sorted(range(vocab), key=lambda i: (-float(logits[i]), i))
    for top_k in (0, 1, 2, 9, 78, 79, 300, vocab, 9999):
        for top_p in (1.0, 0.9, 0.5, 0.01):
            likely = torch.softmax(logits.double()[order[: top_k or vocab]] / 0.7, 0)
            before = likely.cumsum(0) - likely
            kept = int((before < top_p * (1 - 1e-9)).sum()) if top_p < 1 else len(likely)
            params = SamplingParams(max_tokens=1, temperature=0.7, top_k=top_k, top_p=top_p)
            ids, weights = weigh(logits.numpy(), params)
            found = list(range(vocab)) if ids is None else ids.tolist()
            assert found == sorted(order[:kept])
            assert weights / weights.sum() == pytest.approx(
                torch.softmax(logits.double()[found] / 0.7, 0).numpy(), rel=1e-4
            )


@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 5, 300, 513, 3000]),
    st.lists(
        st.builds(
            SamplingParams,
            max_tokens=st.just(9),
            temperature=st.sampled_from([0.0, 0.3, 1.0, 1e-9, 7.0]),
            top_k=st.sampled_from([0, 0, 1, 3, 50]),
            top_p=st.sampled_from([1.0, 0.9, 0.1, 0.999]),
            min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
            seed=st.integers(0, 9),
            logprobs=st.sampled_from([None, 0, 2]),
            presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
            logit_bias=st.sampled_from([{}, {}, {1: 4.0}]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.1, 1.0, 5.0]),
)
@settings(deadline=None)
def test_a_device_picks_what_the_host_picks(
    seed: int, vocab: int, params: list[SamplingParams], spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(len(params), vocab, generator=generator)
    before = logits.clone()
    rows = [[RowState(p, (1,)) for p in params] for _ in range(3)]
    for _ in range(2):
        host, device = pick(logits, rows[0]), DeviceDraw(logits, rows[1]).collect()
        assert [item.token for item in host] == [item.token for item in device]
        assert pick_on_device(logits, rows[2]).tolist() == [item.token for item in host]
        assert [item.logprob for item in host] == pytest.approx([i.logprob for i in device])
        assert [[t for t, _ in item.top] for item in host] == [
            [t for t, _ in i.top] for i in device
        ]
        for states in rows:
            for state, item in zip(states, host, strict=True):
                state.accept(item.token)
    assert torch.equal(logits, before)
