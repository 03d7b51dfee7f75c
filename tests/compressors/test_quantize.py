"""Quantizers against naive float64 references written from the papers' equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors import gram
from compressors.export.autogptq_format import from_gptq, to_gptq
from compressors.gram import Gram
from compressors.quantize import gptq, hqq, rtn
from compressors.quantize.gptq import Settings
from compressors.tensor import Grouped
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.store import pack, unpack
from tests.compressors.layers import draw, naive_grid, output_error, statistic

PLAIN = Settings(by_energy=False, search=False)  # the paper's algorithm 1 on round-to-nearest grids


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
    form = gptq.solve(weight, g, bits=bits, group=group, settings=PLAIN)
    expected = naive_gptq(weight, gram.damped(g, 0.01), bits, group)
    # A tie decided the other way in float32 may move a later code of the same row by one.
    same = (form.dense() - expected).abs() < 1e-4
    assert same.all(dim=1).float().mean() > 0.9
    exact = float(((weight.double() - expected) @ x.double().t()).square().sum())
    assert output_error(weight, form, x) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("group", [8, 24, 64, 128, 160, 300])
def test_gptq_blocks_change_nothing(group: int) -> None:
    weight, x = draw(6, n=16, k=300, tokens=600)
    g = statistic(x)
    blocked = gptq.solve(weight, g, bits=4, group=group)
    whole = gptq.solve(weight, g, bits=4, group=group, settings=Settings(block=512))
    assert (blocked.codes == whole.codes).float().mean() > 0.999
    torch.testing.assert_close(blocked.scales, whole.scales, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 24, 40])
def test_gptq_on_a_diagonal_hessian_is_rtn_bit_for_bit(
    group: int, bits: int, symmetric: bool, by_energy: bool
) -> None:
    weight, x = draw(7)
    diagonal = Gram(torch.diag(x.square().mean(0)), len(x))
    how = Settings(by_energy=by_energy, search=False)
    repaired = gptq.solve(
        weight, diagonal, bits=bits, group=group, symmetric=symmetric, settings=how
    )
    plain = rtn.solve(weight, bits=bits, group=group, symmetric=symmetric)
    assert torch.equal(repaired.codes, plain.codes)
    assert torch.equal(repaired.scales, plain.scales)
    assert torch.equal(repaired.zeros, plain.zeros)


@pytest.mark.parametrize("group", [8, 16, 24])
def test_gptq_with_activation_order_is_rtn_of_the_sorted_columns_on_a_diagonal(group: int) -> None:
    weight, x = draw(7)
    diagonal = Gram(torch.diag(x.square().mean(0)), len(x))
    form = gptq.solve(
        weight, diagonal, bits=3, group=group, act_order=True, settings=Settings(search=False)
    )
    order = torch.argsort(x.square().mean(0), descending=True)
    plain = rtn.solve(weight[:, order], bits=3, group=group)
    assert torch.equal(form.codes[:, order], plain.codes)
    assert torch.equal(form.dense()[:, order], plain.dense())
    assert form.perm is not None
    assert form.perm[order].tolist() == [i // group for i in range(40)]


@pytest.mark.parametrize("group", [8, 24, 200])
def test_activation_order_reaches_the_kernel_the_file_and_the_gptq_format(group: int) -> None:
    weight, x = draw(14, n=32, k=160, tokens=400)
    form = gptq.solve(weight, statistic(x), bits=4, group=min(group, 160), act_order=True)
    assert (form.perm is None) == (group > 160)  # one group needs no permutation
    stored = pack(form)
    torch.testing.assert_close(unpack(stored).dense(), form.dense(), rtol=1e-3, atol=1e-5)
    layer = make_linear(stored, None, dtype=torch.float32)
    product = x[:9] @ form.dense().t()
    assert float((layer(x[:9]) - product).norm()) < 0.02 * float(product.norm())
    back = from_gptq(to_gptq(form, "gptq_v2"), 4, form.group, "gptq_v2")
    torch.testing.assert_close(back.dense(), form.dense(), rtol=1e-3, atol=1e-5)


def test_activation_order_with_a_mask_keeps_the_groups_of_the_mask() -> None:
    weight, x = draw(10)
    mask = weight.abs() > weight.abs().median(1, keepdim=True).values
    plain, ordered = (
        gptq.solve(weight, statistic(x), bits=4, group=10, mask=mask, act_order=order)
        for order in (False, True)
    )
    assert ordered.perm is None
    assert torch.equal(plain.dense(), ordered.dense())


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rtn_on_fifty_of_fifty_draws(act_order: bool) -> None:
    for seed in range(50):
        weight, x = draw(seed, n=16, k=32)
        repaired = gptq.solve(weight, statistic(x), bits=4, group=16, act_order=act_order)
        assert output_error(weight, repaired, x) <= output_error(
            weight, rtn.solve(weight, bits=4, group=16), x
        )


def test_gptq_by_energy_needs_no_permutation() -> None:
    weight, x = draw(8)
    how = Settings(search=False)
    form = gptq.solve(weight, statistic(x), bits=4, group=16, settings=how)
    assert form.perm is None
    assert torch.equal(form.scales, rtn.solve(weight, bits=4, group=16).scales)


@pytest.mark.parametrize("group", [32, 64, 128, 1376])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_1376_columns_at_any_group(group: int, act_order: bool) -> None:
    weight, x = draw(13, n=8, k=1376, tokens=64)
    g = statistic(x)
    for symmetric in (False, True):
        form = gptq.solve(weight, g, bits=3, group=group, symmetric=symmetric, act_order=act_order)
        assert form.shape == (8, 1376)
        assert form.scales.shape == (8, -(-1376 // group))
        plain = rtn.solve(weight, bits=3, group=group, symmetric=symmetric)
        assert output_error(weight, form, x) < output_error(weight, plain, x)


def test_layers_of_one_input_share_the_factor() -> None:
    weight, x = draw(15)
    shared = statistic(x)
    both = [gptq.solve(weight * s, shared, bits=4, group=8) for s in (1, -2)]
    for form, scale in zip(both, (1, -2), strict=True):
        alone = gptq.solve(weight * scale, statistic(x), bits=4, group=8)
        assert torch.equal(form.codes, alone.codes)
    gram.accumulate(shared, 3 * x.flip(1))  # what it has seen now is something else
    fresh = Gram(shared.matrix, shared.tokens)
    after, expected = (gptq.solve(weight, g, bits=4, group=8) for g in (shared, fresh))
    assert torch.equal(after.codes, expected.codes)
    assert not torch.equal(after.codes, both[0].codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 24, 40])
def test_symmetric_hqq_has_no_zeros_and_beats_rtn(bits: int, group: int) -> None:
    weight, _ = draw(4, n=64)
    weight[::7, ::5] *= 6  # outliers
    plain = rtn.solve(weight, bits=bits, group=group, symmetric=True)
    fitted = hqq.solve(weight, bits=bits, group=group, symmetric=True)
    assert fitted.symmetric
    error, before = ((f.dense() - weight).square().sum() for f in (fitted, plain))
    assert error < 0.99 * before


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
