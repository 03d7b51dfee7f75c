"""AWQ against a naive float64 version written from its equations, and what it claims."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors.forms.scaled import Scaled
from compressors.quantize import awq, rtn
from compressors.tensor import Grouped
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.store import pack, unpack
from tests.compressors.layers import draw, naive_grid, output_error, statistic


def outlying(seed: int, **sizes: int) -> tuple[Tensor, Tensor]:
    """A layer some of whose input columns are much larger than the rest, as in trained models."""
    weight, x = draw(seed, **sizes)
    return weight, x * (1 + 9 * (torch.arange(x.shape[1]) % 7 == 0))


def naive_quantize(row: list[float], bits: int, scale: float, zero: int) -> list[float]:
    return [scale * (min(max(round(w / scale + zero), 0), 2**bits - 1) - zero) for w in row]


def naive_awq(weight: Tensor, x: Tensor, bits: int, group: int) -> tuple[float, Tensor]:
    """Eqs. 4 and 5 by trying every power on the inputs themselves, then clipping every group on its
    own inputs; the power and the weight computed with. Loops, float64."""
    w, x = weight.double(), x.double()
    magnitude = x.square().mean(0).sqrt()
    best = (float("inf"), 0.0)
    for step in range(20):
        s = magnitude ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        quantized = torch.zeros_like(w)
        for i, row in enumerate((w * s).tolist()):
            for start in range(0, len(row), group):
                part = row[start : start + group]
                grid = naive_grid(part, bits)
                quantized[i, start : start + len(part)] = torch.tensor(
                    naive_quantize(part, bits, *grid), dtype=torch.float64
                )
        loss = float(((quantized / s - w) @ x.t()).square().mean())
        best = min(best, (loss, step / 20))
    s = magnitude ** best[1]
    s = s / (s.max() * s.min()).sqrt()
    out = torch.zeros_like(w)
    for i, row in enumerate((w * s).tolist()):
        for start in range(0, len(row), group):
            part, inputs = row[start : start + group], x[:, start : start + group]
            inputs = inputs / s[start : start + group]
            choices = []
            for step in range(10):
                share = 1 - step / 20
                grid = naive_grid([share * min(part), share * max(part)], bits)
                values = torch.tensor(naive_quantize(part, bits, *grid), dtype=torch.float64)
                wrong = inputs @ (values - torch.tensor(part, dtype=torch.float64))
                choices.append((float(wrong.square().sum()), -step, values))
            out[i, start : start + len(part)] = min(choices, key=lambda c: c[:2])[2]
    return best[1], out / s


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 24), (2, 40)])
def test_awq_follows_the_equations(bits: int, group: int) -> None:
    weight, x = outlying(21, n=12)
    form = awq.solve(weight, statistic(x), bits=bits, group=group)
    power, expected = naive_awq(weight, x, bits, group)
    assert isinstance(form, Scaled) == (power > 0)
    # float32 may decide a tie otherwise.
    same = (form.dense() - expected).abs() < 1e-4
    assert same.float().mean() > 0.97
    exact = float(((weight.double() - expected) @ x.double().t()).square().sum())
    assert output_error(weight, form, x) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_beats_rtn_on_fifty_of_fifty_draws(bits: int) -> None:
    for seed in range(50):
        weight, x = outlying(seed, n=16, k=32)
        fitted = awq.solve(weight, statistic(x), bits=bits, group=16)
        plain = rtn.solve(weight, bits=bits, group=16)
        assert output_error(weight, fitted, x) <= output_error(weight, plain, x)


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_inputs_need_no_scale(symmetric: bool) -> None:
    weight, x = draw(22)
    even = torch.linalg.qr(x).Q * len(x) ** 0.5  # uncorrelated columns of equal size
    form = awq.solve(weight, statistic(even), bits=4, group=20, symmetric=symmetric)
    assert isinstance(form, Grouped)
    assert form.symmetric == symmetric


@pytest.mark.parametrize("group", [32, 128, 1376])
def test_awq_of_1376_columns_at_any_group(group: int) -> None:
    weight, x = outlying(23, n=8, k=1376, tokens=64)
    form = awq.solve(weight, statistic(x), bits=3, group=group)
    plain = rtn.solve(weight, bits=3, group=group)
    assert form.shape == weight.shape
    assert output_error(weight, form, x) < output_error(weight, plain, x)


def test_awq_survives_dead_inputs_and_refuses_broken_ones() -> None:
    weight, x = draw(24)
    x[:, 3] = 0
    for inputs in (x, torch.zeros_like(x)):
        form = awq.solve(weight, statistic(inputs), bits=4, group=16)
        assert torch.isfinite(form.dense()).all()
        assert (form.dense() - weight).abs().max() < 3
    bad = statistic(x)
    bad.matrix[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        awq.solve(weight, bad, bits=4, group=16)


def test_a_scaled_form_is_stored_and_computed_as_it_means() -> None:
    weight, x = outlying(25, n=33, k=100)
    form = awq.solve(weight, statistic(x), bits=4, group=32)
    assert isinstance(form, Scaled)
    stored = pack(form.stored_as(torch.bfloat16))
    torch.testing.assert_close(unpack(stored).dense(), form.dense(), rtol=1e-3, atol=1e-5)
    assert form.nbytes == form.form.nbytes + 4 * 100
    layer = make_linear(stored, None, dtype=torch.float32)
    product = x[:9] @ form.dense().t()
    assert float((layer(x[:9]) - product).norm()) < 0.02 * float(product.norm())


def test_a_scale_that_is_not_finite_is_not_stored() -> None:
    weight, _ = draw(26)
    form = Scaled(rtn.solve(weight, bits=4, group=8), torch.full((40,), torch.inf))
    with pytest.raises(ValueError, match="input scale"):
        pack(form)
