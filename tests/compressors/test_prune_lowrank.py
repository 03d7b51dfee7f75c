"""Pruning and low rank against what the papers say in plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compressors.lowrank import svd
from compressors.prune import depth, magnitude, wanda
from compressors.tensor import Sparse24
from tests.compressors.test_quantize import draw, statistic


def naive_mask(score: Tensor) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for start in range(0, len(row), 4):
            best = sorted(range(4), key=lambda p: (-row[start + p], p))[:2]
            for position in best:
                mask[i, start + position] = True
    return mask


def check_pattern(form: Sparse24, weight: Tensor, mask: Tensor) -> None:
    assert torch.equal(form.dense(), weight * mask)
    assert ((form.dense() != 0).view(len(weight), -1, 4).sum(-1) <= 2).all()
    pairs = form.index.view(len(weight), -1, 2)
    assert (pairs[..., 0] < pairs[..., 1]).all()
    assert torch.equal(magnitude.mask_of(form), mask)


def test_magnitude_keeps_the_two_largest_of_four() -> None:
    weight, _ = draw(1)
    weight[0, :8] = 1.0  # ties
    check_pattern(magnitude.solve(weight, pattern="24"), weight, naive_mask(weight.abs()))


def test_wanda_sorts_by_weight_times_input_norm() -> None:
    weight, x = draw(2)
    energy = wanda.empty(x.shape[1])
    for part in x.split(50):
        wanda.accumulate(energy, part)
    score = weight.abs() * x.norm(dim=0)
    check_pattern(wanda.solve(weight, energy, pattern="24"), weight, naive_mask(score))


def test_wanda_loses_less_output_than_magnitude() -> None:
    for seed in range(20):
        weight, x = draw(seed)
        energy = wanda.empty(x.shape[1])
        wanda.accumulate(energy, x)

        def loss(form: Sparse24, weight: Tensor = weight, x: Tensor = x) -> float:
            return float(((weight - form.dense()) @ x.t()).norm())

        assert loss(wanda.solve(weight, energy, pattern="24")) < loss(
            magnitude.solve(weight, pattern="24")
        )


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of four"):
        magnitude.solve(torch.zeros(2, 6), pattern="24")


def test_whitened_svd_loses_exactly_the_truncated_singular_values() -> None:
    weight, x = draw(3, tokens=400)
    whitener = torch.linalg.cholesky(x.double().t() @ x.double() / len(x))
    singular = torch.linalg.svdvals(weight.double() @ whitener)
    for rank in (1, 5, 12):
        form = svd.solve(weight, statistic(x), rank=rank)
        assert form.rank == rank
        loss = ((weight - form.dense()) @ x.t()).double().square().sum() / len(x)
        assert float(loss) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)


def test_no_other_weight_of_that_rank_loses_less() -> None:
    weight, x = draw(4, tokens=400)
    best = svd.solve(weight, statistic(x), rank=6).dense()
    u, s, vt = torch.linalg.svd(weight)
    plain = (u[:, :6] * s[:6]) @ vt[:6]

    def loss(w: Tensor) -> float:
        return float(((weight - w) @ x.t()).square().sum())

    assert loss(best) < 0.9 * loss(plain)
    generator = torch.Generator().manual_seed(0)
    left, right = svd.solve(weight, statistic(x), rank=6).left.dense(), None
    right = svd.solve(weight, statistic(x), rank=6).right.dense()
    for _ in range(50):
        noise = 1e-2 * torch.randn(right.shape, generator=generator)
        assert loss(left @ (right + noise)) >= loss(best)


def test_full_rank_gives_the_weight_back() -> None:
    weight, x = draw(5, tokens=400)
    torch.testing.assert_close(
        svd.solve(weight, statistic(x), rank=24).dense(), weight, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("n", "k", "percent"), [(384, 384, 80), (56, 32, 5), (1, 7, 50), (3, 3, 99)]
)
def test_rank_keeps_within_the_share_of_parameters(n: int, k: int, percent: int) -> None:
    rank = svd.rank_of(n, k, percent)
    assert rank * (n + k) <= n * k * percent / 100 < (rank + 1) * (n + k)


class FakeProbe:
    """Blocks with worths; two of them do the same work, so only one of the two may go."""

    worth = (9.0, 1.0, 1.0, 2.5, 9.0)
    twins = (1, 2)

    def influence(self) -> Sequence[float]:
        return self.worth

    def loss(self, kept: Sequence[int]) -> float:
        lost = sum(w for i, w in enumerate(self.worth) if i not in kept)
        return lost + (50.0 if not set(self.twins) & set(kept) else 0.0)


def test_depth_drops_one_by_one_so_twins_are_not_both_lost() -> None:
    assert depth.solve(FakeProbe(), kept=4) in [(0, 2, 3, 4), (0, 1, 3, 4)]
    kept = depth.solve(FakeProbe(), kept=3)
    assert 3 not in kept
    assert set(kept) & {1, 2}


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = (
        1
        - sum(
            float(a @ b / (a.norm() * b.norm()))
            for a, b in zip(x.view(-1, 8), y.view(-1, 8), strict=True)
        )
        / 10
    )
    assert depth.block_influence(x, y) == pytest.approx(expected, abs=1e-6)
    assert depth.block_influence(x, 3 * x) == pytest.approx(0, abs=1e-6)
