"""Lengths of answers: what is expected of the next one, from those that ended or were cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.lengths import Length, Lengths


def taught(tokens: list[int], max_tokens: int) -> Lengths:
    lengths = Lengths()
    for count in tokens:
        lengths.learn("p", min(count, max_tokens), max_tokens)
    return lengths


def test_without_answers_all_that_is_allowed_is_expected() -> None:
    for known in (Lengths().of("p", 50), Lengths().of(None, 50), Length.certain(50)):
        assert known.expected == 50
        assert known.upper(0.9) == 50


def test_answers_that_are_always_cut_say_nothing_of_shorter_ones() -> None:
    length = taught([1000] * 200, 64).of("p", 64)
    assert length.expected == 64
    assert length.upper(0.5) == 64


@pytest.mark.parametrize("max_tokens", [16, 100, 1000])
def test_mean_and_quantile_of_geometric_answers(max_tokens: int) -> None:
    """Against the same numbers drawn anew; some of the answers learned from were cut."""
    rng = np.random.default_rng(2)
    lengths = Lengths()
    for tokens, allowed in zip(
        rng.geometric(1 / 60, 1500).tolist(),
        rng.choice([40, 200, 1000], 1500).tolist(),
        strict=True,
    ):
        lengths.learn("p", min(tokens, allowed), allowed)
    length = lengths.of("p", max_tokens)
    fresh = np.minimum(rng.geometric(1 / 60, 100_000), max_tokens)
    assert length.expected == pytest.approx(fresh.mean(), rel=0.2)
    kept = np.mean(fresh <= length.upper(0.9))
    assert kept >= 0.87
    assert kept <= 0.94 or length.upper(0.9) == max_tokens


def test_policies_learn_for_themselves_and_the_past_fades() -> None:
    lengths = taught([10] * 100, 500)
    assert lengths.of("p", 500).expected < 40
    assert lengths.of("q", 500).expected == 500
    for _ in range(2000):
        lengths.learn("p", 300, 500)
    assert lengths.of("p", 500).expected == pytest.approx(300, rel=0.15)


def test_state_is_bounded() -> None:
    lengths = Lengths()
    for number in range(600):
        lengths.learn(f"p{number}", 5, 10)
    assert len(lengths) <= 256
    assert lengths.of("p599", 1000).expected < 1000


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=30),
    max_tokens=st.integers(0, 10**7),
    share=st.floats(0.5, 0.99),
)
def test_always_between_one_and_what_is_allowed(
    answers: list[tuple[int, int]], max_tokens: int, share: float
) -> None:
    lengths = Lengths()
    for tokens, allowed in answers:
        lengths.learn("p", tokens, allowed)
    length = lengths.of("p", max_tokens)
    most = max(1, max_tokens)
    assert 1 <= length.expected <= most
    assert length.expected <= length.upper(share) <= most
    assert length.upper(share) <= length.upper(0.99)
    assert lengths.of("p", max_tokens + 1).expected >= length.expected
