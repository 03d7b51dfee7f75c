"""Quantizers against naive float64 references written from the papers' equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors import gram
from compressors.gram import Gram
from compressors.quantize import gptq, hqq, rtn
from compressors.tensor import Grouped


def draw(seed: int, n: int = 24, k: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and correlated inputs [tokens, k] with uneven column energy."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + 0.3 * torch.eye(k)
    scale = torch.rand(k, generator=generator) + 0.05
    x = torch.randn(tokens, k, generator=generator) @ mix * scale
    return torch.randn(n, k, generator=generator), x


def statistic(x: Tensor) -> Gram:
    result = gram.empty(x.shape[1])
    for part in x.split(64):
        gram.accumulate(result, part)
    return result


def output_error(weight: Tensor, form: Grouped, x: Tensor) -> float:
    return float(((weight - form.dense()) @ x.t()).square().sum())


def naive_grid(values: list[float], bits: int) -> tuple[float, int]:
    lo, hi = min(0.0, *values), max(0.0, *values)
    scale = float(torch.tensor((hi - lo) / (2**bits - 1)).half()) or 1.0
    return scale, min(max(round(-lo / scale), 0), 2**bits - 1)


def naive_rtn(weight: Tensor, bits: int, group: int) -> Tensor:
    rows = []
    for row in weight.tolist():
        out: list[float] = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale, zero = naive_grid(part, bits)
            codes = [min(max(round(w / scale + zero), 0), 2**bits - 1) for w in part]
            out += [scale * (code - zero) for code in codes]
        rows.append(out)
    return torch.tensor(rows)


def naive_gptq(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """Optimal brain quantization in column order with the inverse of the remaining H made anew for
    every column (GPTQ eqs. 2 and 3), on the grids of the weights as given, in float64."""
    w, h = weight.double().clone(), hessian.double()
    out = torch.zeros_like(w)
    columns = w.shape[1]
    for j in range(columns):
        start = j // group * group
        grids = [naive_grid(row[start : start + group].tolist(), bits) for row in weight]
        inverse = torch.linalg.inv(h[j:, j:])
        for i, (scale, zero) in enumerate(grids):
            code = min(max(round(float(w[i, j]) / scale + zero), 0), 2**bits - 1)
            out[i, j] = scale * (code - zero)
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("group", [8, 16, 24, 40])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_is_the_nearest_point_of_the_grid(bits: int, group: int) -> None:
    weight, _ = draw(1)
    form = rtn.solve(weight, bits=bits, group=group)
    torch.testing.assert_close(form.dense(), naive_rtn(weight, bits, group), rtol=0, atol=1e-5)
    assert int(form.codes.max()) < 2**bits


def test_rtn_symmetric_has_its_zero_at_half_range() -> None:
    weight, _ = draw(2)
    form = rtn.solve(weight, bits=8, group=40, symmetric=True)
    assert form.symmetric
    step = form.scales.amax()
    assert (form.dense() - weight).abs().max() <= step * 0.6


def test_rtn_keeps_zero_exact_and_survives_flat_groups() -> None:
    weight = torch.zeros(3, 16)
    weight[1] = 0.5
    weight[2, :8] = -3.0
    for bits in (2, 4, 8):
        dense = rtn.solve(weight, bits=bits, group=8).dense()
        assert torch.equal(dense[0], weight[0])
        torch.testing.assert_close(dense, weight, rtol=1e-3, atol=1e-6)


def test_scales_are_float16_numbers() -> None:
    weight, x = draw(3)
    for form in (
        rtn.solve(weight * 1e-6, bits=4, group=16),
        hqq.solve(weight, bits=4, group=16),
        gptq.solve(weight, statistic(x), bits=4, group=16),
    ):
        assert torch.equal(form.scales.half().float(), form.scales)
        assert torch.equal(form.zeros.half().float(), form.zeros)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 24, 40])
def test_hqq_is_never_worse_than_rtn_in_any_group(bits: int, group: int) -> None:
    weight, _ = draw(4, n=64)
    weight[::7, ::5] *= 6  # outliers
    plain = rtn.solve(weight, bits=bits, group=group)
    fitted = hqq.solve(weight, bits=bits, group=group)

    def losses(form: Grouped) -> Tensor:
        error = (form.dense() - weight).square()
        return torch.stack([error[:, s : s + group].sum(1) for s in range(0, 40, group)])

    assert (losses(fitted) <= losses(plain) * (1 + 1e-5) + 1e-7).all()
    assert losses(fitted).sum() < losses(plain).sum() * 0.99


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, 16), (3, 40), (2, 24)])
def test_gptq_follows_the_equations(bits: int, group: int) -> None:
    weight, x = draw(5)
    g = statistic(x)
    form = gptq.solve(weight, g, bits=bits, group=group, act_order=False, search=False)
    expected = naive_gptq(weight, gram.damped(g, 0.01), bits, group)
    # A tie decided the other way in float32 may move a later code of the same row by one.
    same = (form.dense() - expected).abs() < 1e-4
    assert same.all(dim=1).float().mean() > 0.9
    exact = float(((weight.double() - expected) @ x.double().t()).square().sum())
    assert output_error(weight, form, x) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("group", [8, 24, 64, 128, 160, 300])
def test_gptq_blocks_change_nothing(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(6, n=16, k=300, tokens=600)
    g = statistic(x)
    blocked = gptq.solve(weight, g, bits=4, group=group)
    monkeypatch.setattr(gptq, "_BLOCK", 512)
    whole = gptq.solve(weight, g, bits=4, group=group)
    assert (blocked.codes == whole.codes).float().mean() > 0.999
    torch.testing.assert_close(blocked.scales, whole.scales, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 40])
def test_gptq_on_a_diagonal_hessian_is_rtn_bit_for_bit(
    group: int, symmetric: bool, act_order: bool
) -> None:
    weight, x = draw(7)
    diagonal = Gram(torch.diag(x.square().mean(0)), len(x))
    settings = {"bits": 4, "group": group, "symmetric": symmetric}
    repaired = gptq.solve(weight, diagonal, **settings, act_order=act_order, search=False)
    plain = rtn.solve(weight, **settings)
    assert torch.equal(repaired.codes, plain.codes)
    assert torch.equal(repaired.scales, plain.scales)
    assert torch.equal(repaired.zeros, plain.zeros)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rtn_on_fifty_of_fifty_draws(act_order: bool) -> None:
    for seed in range(50):
        weight, x = draw(seed, n=16, k=32)
        repaired = gptq.solve(weight, statistic(x), bits=4, group=16, act_order=act_order)
        assert output_error(weight, repaired, x) <= output_error(
            weight, rtn.solve(weight, bits=4, group=16), x
        )


def test_gptq_with_activation_order_needs_no_permutation() -> None:
    weight, x = draw(8)
    form = gptq.solve(weight, statistic(x), bits=4, group=16, act_order=True, search=False)
    assert form.perm is None
    assert torch.equal(form.scales, rtn.solve(weight, bits=4, group=16).scales)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_fitted_grid_is_never_worse_than_the_full_one(symmetric: bool) -> None:
    weight, _ = draw(12, n=64)
    index = torch.arange(40) // 10
    errors = []
    for scales, zeros in (
        rtn.grid(*rtn.group_range(weight, 10), 3, symmetric),
        rtn.fitted_grid(weight, 3, 10, symmetric),
    ):
        codes = rtn.encode(weight, scales[:, index], zeros[:, index], 3).float()
        dense = scales[:, index] * (codes - zeros[:, index])
        errors.append((dense - weight).square().view(64, 4, 10).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_gptq_survives_dead_and_equal_inputs() -> None:
    weight, x = draw(9, tokens=10)  # fewer tokens than columns: singular
    x[:, 3] = 0
    x[:, 5] = x[:, 6]
    for inputs in (x, torch.zeros_like(x)):
        form = gptq.solve(weight, statistic(inputs), bits=4, group=16)
        assert torch.isfinite(form.dense()).all()
        assert (form.dense() - weight).abs().max() < 3
    bad = statistic(x)
    bad.matrix[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq.solve(weight, bad, bits=4, group=16)


def test_gptq_mask_prunes_and_repairs() -> None:
    weight, x = draw(10)
    mask = weight.abs() > weight.abs().median(1, keepdim=True).values
    form = gptq.solve(weight, statistic(x), bits=8, group=20, mask=mask)
    repaired = torch.zeros_like(weight).masked_scatter(mask, form.dense())
    before = ((weight - weight * mask) @ x.t()).square().sum()
    after = ((weight - repaired) @ x.t()).square().sum()
    assert after < 0.95 * before


def test_gram_is_the_mean_outer_product_however_it_is_fed() -> None:
    _, x = draw(11)
    g = statistic(x)
    torch.testing.assert_close(
        g.matrix.double(), x.double().t() @ x.double() / len(x), rtol=1e-4, atol=1e-5
    )
    assert g.tokens == len(x)
    right = torch.randn(7, x.shape[1])
    torch.testing.assert_close(
        gram.project(g, right).matrix, statistic(x @ right.t()).matrix, rtol=1e-3, atol=1e-4
    )
