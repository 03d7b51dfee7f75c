"""W8A8, SmoothQuant, LLM.int8() and FP8 against naive float64 versions of the papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compressors.forms.int8 import Int8
from compressors.forms.outlier import Outlier
from compressors.quantize import fp8, inputs, outlier, smoothquant, w8a8
from compressors.quantize.inputs import Inputs
from compressors.tensor import LinearForm

OUTLIERS = (3, 17, 40)


def draw(seed: int, n: int = 24, k: int = 128, tokens: int = 256) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and inputs [tokens, k] of which three columns are 60 times the others, as in
    large language models (LLM.int8(), section 4)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator)
    x[:, OUTLIERS] *= 60
    return torch.randn(n, k, generator=generator) / k**0.5, x


def statistic(x: Tensor) -> Inputs:
    result = inputs.empty(x.shape[1])
    for start in range(0, len(x), 50):
        inputs.accumulate(result, x[start : start + 50])
    return result


def naive_codes(row: list[float]) -> tuple[list[int], float]:
    step = max(map(abs, row)) / 127 or 1.0
    return [max(-127, min(127, round(value / step))) for value in row], step


def naive_w8a8(x: Tensor, weight: Tensor) -> Tensor:
    """SmoothQuant eqs. 1 and 2 in loops: integers times the product of two steps."""
    rows = [naive_codes(row) for row in x.tolist()]
    columns = [naive_codes(row) for row in weight.tolist()]
    return torch.tensor(
        [
            [sum(p * q for p, q in zip(a, b, strict=True)) * da * db for b, db in columns]
            for a, da in rows
        ],
        dtype=torch.float64,
    )


def naive_smoothing(x: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant eq. 4 in loops."""
    out = []
    for j in range(x.shape[1]):
        largest_x = max(abs(v) for v in x[:, j].tolist())
        largest_w = max(abs(v) for v in weight[:, j].tolist())
        out.append(largest_x**alpha / largest_w ** (1 - alpha))
    return torch.tensor(out, dtype=torch.float64)


def error(got: Tensor, x: Tensor, weight: Tensor) -> float:
    exact = x.double() @ weight.double().t()
    return float((got.double() - exact).norm() / exact.norm())


def output(form: LinearForm, x: Tensor) -> Tensor:
    """What a layer of that form gives, activations rounded where the level rounds them."""
    if isinstance(form, Outlier):
        apart = x[:, form.columns.long()] @ form.values.weight.float().t()
        return output(form.rest, x) + apart
    assert isinstance(form, Int8)
    return w8a8.product(x, form)


def test_w8a8_is_the_papers_product() -> None:
    weight, x = draw(0, tokens=20)
    got = w8a8.product(x, w8a8.solve(weight))
    torch.testing.assert_close(got.double(), naive_w8a8(x, weight), rtol=1e-4, atol=1e-4)


def test_smoothing_is_equation_four_up_to_a_common_factor() -> None:
    weight, x = draw(1)
    for alpha in (0.5, 0.8):
        ratio = smoothquant.smoothing(statistic(x).absmax, weight, alpha).double()
        ratio /= naive_smoothing(x, weight, alpha)
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=0)


def test_smoothquant_computes_the_smoothed_layer() -> None:
    """Its product is the plain W8A8 product of X diag(s)⁻¹ and diag(s) W (eq. 3)."""
    weight, x = draw(2, tokens=20)
    form = smoothquant.solve(weight, statistic(x))
    assert form.inputs is not None
    expected = naive_w8a8(x * form.inputs, weight / form.inputs)
    torch.testing.assert_close(w8a8.product(x, form).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_outliers_are_worth_smoothing_and_worth_keeping(seed: int) -> None:
    """The order of SmoothQuant's table 1 and LLM.int8()'s table 1, on unseen inputs."""
    weight, x = draw(seed)
    seen = statistic(x[:128])
    plain = error(naive_w8a8(x[128:160], weight), x[128:160], weight)
    smooth = error(output(smoothquant.solve(weight, seen), x[128:160]), x[128:160], weight)
    apart = error(output(outlier.solve(weight, seen), x[128:160]), x[128:160], weight)
    assert smooth < 0.5 * plain
    assert apart < 0.5 * plain


def test_smoothquant_on_the_calibration_sample_never_loses() -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(16, 32, generator=generator)
        x = torch.randn(64, 32, generator=generator)  # nothing to smooth
        seen = statistic(x)
        form = smoothquant.solve(weight, seen)
        plain = w8a8.product(seen.sample, w8a8.solve(weight))
        best = w8a8.product(seen.sample, form)
        assert error(best, seen.sample, weight) <= error(plain, seen.sample, weight)


def test_outlier_columns_are_the_large_ones_in_sixteen_bits() -> None:
    weight, x = draw(3, n=96)
    form = outlier.solve(weight, statistic(x)).stored_as(torch.bfloat16)
    assert isinstance(form, Outlier)
    assert tuple(form.columns.tolist()) == OUTLIERS
    assert torch.equal(form.values.weight, weight[:, OUTLIERS].bfloat16())
    assert torch.equal(form.dense()[:, OUTLIERS], weight[:, OUTLIERS].bfloat16().float())
    assert not form.rest.dense()[:, OUTLIERS].any()
    assert form.nbytes < 0.6 * 2 * weight.numel()


def test_without_outliers_nothing_is_kept_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=generator).clamp(-3, 3)
    assert isinstance(outlier.solve(torch.randn(8, 64), statistic(x)), Int8)


def test_the_statistic_is_that_of_all_batches_together() -> None:
    _, x = draw(4, tokens=333)
    seen = statistic(x)
    torch.testing.assert_close(seen.absmax, x.abs().amax(0))
    assert math.isclose(seen.rms, float(x.square().mean().sqrt()), rel_tol=1e-5)
    assert seen.tokens == 333
    rows = {tuple(row) for row in x.tolist()}
    assert all(tuple(row) in rows for row in seen.sample.tolist())


def test_the_sample_stays_bounded() -> None:
    seen = inputs.empty(4)
    for _ in range(100):
        inputs.accumulate(seen, torch.randn(200, 4))
    assert 256 <= len(seen.sample) <= 512


def test_dead_columns_and_rows_stay_zero() -> None:
    weight, x = draw(5)
    weight[2], weight[:, 9], x[:, 11] = 0, 0, 0
    for solve in (smoothquant.solve, outlier.solve):
        form = solve(weight, statistic(x))
        dense = form.dense()
        assert torch.isfinite(dense).all()
        assert not dense[2].any()
        assert not dense[:, 9].any()
    for plain in (w8a8.solve(weight), fp8.solve(weight)):
        assert torch.isfinite(plain.dense()).all()
        assert not plain.dense()[2].any()


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, x = draw(6)
    x[0, 0] = float("inf")
    for solve in (smoothquant.solve, outlier.solve):
        with pytest.raises(ValueError, match="finite"):
            solve(weight, statistic(x))


def e4m3_values() -> list[float]:
    """Every finite E4M3 number by arXiv:2209.05433, table 1: bias 7, S.1111.111 is NaN."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        size = (
            mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
        values += [size, -size]
    return values


def test_fp8_codes_are_the_nearest_numbers_of_the_format() -> None:
    weight, _ = draw(7)
    form = fp8.solve(weight)
    table = torch.tensor(e4m3_values(), dtype=torch.float64)
    assert float(table.max()) == fp8.LARGEST
    for row, scale, dense in zip(weight, form.scales, form.dense(torch.float64), strict=True):
        wanted = row.double() / scale.double()
        nearest = (wanted.unsqueeze(1) - table).abs().amin(1)
        error = (dense / scale.double() - wanted).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-4)
        assert math.isclose(float(row.abs().max() / scale), fp8.LARGEST, rel_tol=1e-6)
