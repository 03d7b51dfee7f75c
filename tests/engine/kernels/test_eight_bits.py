"""Int8 and FP8 products: exact in integers, each token for itself, on CPU and on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors.forms.float8 import Float8
from compressors.forms.int8 import Int8
from compressors.quantize import fp8, w8a8
from gateway.engine.kernels import float8
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.store import pack, unpack
from tests.engine.kernels.forms import int8, outlier


def exact(form: Int8, x: Tensor) -> Tensor:
    """The layer in float64, with inputs rounded to the nearest of 255 levels per token."""
    x = x.double() if form.inputs is None else x.double() * form.inputs.double()
    step = x.abs().amax(1, keepdim=True) / 127
    codes = torch.where(step > 0, torch.round(x / step), 0.0)
    return (codes @ form.codes.double().t()) * step * form.scales.double()


def layer_of(form: Int8 | Float8, dtype: torch.dtype, bias: Tensor | None = None) -> KernelLinear:
    return make_linear(pack(form), bias, dtype=dtype)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 65), (33, 100), (70, 384), (16, 4096)])
def test_the_product_is_one_of_integers(backend: str, n: int, k: int) -> None:
    form, bias = int8((n, k)), torch.randn(n)
    layer = layer_of(form, torch.float32, bias)
    for rows in (1, 2, 5, 6, 7, 13, 200):
        x = torch.randn(rows, k) * torch.rand(rows, 1) * 100
        wanted = exact(form, x) + bias.double()
        # A value half way between two levels may go either way: one step of one weight.
        half_way = float((form.codes.abs().amax() * form.scales.max() * x.abs().max()) / 127)
        error = (layer(x).double() - wanted).abs()
        assert float(error.max()) <= 2 * half_way + 1e-4
        assert float(error.median()) <= 1e-5 * float(wanted.abs().max())


def test_inputs_are_multiplied_before_they_are_rounded(backend: str) -> None:
    plain = int8((40, 100))
    form = Int8(plain.codes, plain.scales, torch.rand(100) * 4)
    assert form.inputs is not None
    x = torch.randn(9, 100)
    x[:, 7] *= 100
    form.inputs[7] = 0.01
    layer = layer_of(form, torch.float32)
    torch.testing.assert_close(layer(x), layer_of(plain, torch.float32)(x * form.inputs))
    torch.testing.assert_close(layer(x).double(), exact(form, x), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_does_not_see_its_neighbours(backend: str, dtype: torch.dtype) -> None:
    for form in (int8((33, 100)), outlier((33, 100)).rest):
        assert isinstance(form, Int8)
        layer = layer_of(form, dtype)
        x = torch.randn(30, 100).to(dtype)
        alone = torch.cat([layer(row[None]) for row in x])
        x[1::2] *= 1000
        assert torch.equal(layer(x)[::2], alone[::2])


def test_the_largest_sums_do_not_overflow(backend: str) -> None:
    """The widest layer of the native kernel, every product as large as can be."""
    k = 1 << 16
    form = Int8(torch.full((5, k), 127, dtype=torch.int8), torch.ones(5))
    for x in (torch.ones(1, k), -torch.ones(7, k)):
        wanted = torch.full((len(x), 5), 127.0 * k) * x[0, 0]
        torch.testing.assert_close(layer_of(form, torch.float32)(x), wanted)


def test_a_wider_layer_still_computes(backend: str) -> None:
    form = int8((3, (1 << 16) + 64))
    x = torch.randn(2, form.shape[1])
    wanted = exact(form, x)
    torch.testing.assert_close(layer_of(form, torch.float32)(x).double(), wanted, rtol=1e-2, atol=1)


def test_what_is_not_finite_stays_with_its_token(backend: str) -> None:
    layer = layer_of(int8((33, 100)), torch.bfloat16)
    x = torch.randn(3, 100).bfloat16()
    clean = layer(x)
    for bad in (float("nan"), float("inf")):
        x[1, 5] = bad
        out = layer(x)
        assert not torch.isfinite(out[1]).any()
        assert torch.equal(out[::2], clean[::2])


def test_rounding_of_long_batches_in_pieces(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = int8((60, 100))
    layer = layer_of(form, torch.float32)
    x = torch.randn(2, 100, 100)
    whole = layer.reference(x)
    monkeypatch.setattr("gateway.engine.kernels.int8.SCRATCH_BYTES", 60 * 4 * 33)
    assert torch.equal(layer.reference(x), whole)


def test_every_float8_is_widened_to_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = (codes & 0x7F) != 0x7F
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(float8.widen(codes)[finite], wanted[finite])


def test_stored_eight_bits_come_back_unchanged() -> None:
    weight = torch.randn(20, 36)
    one, two = w8a8.solve(weight), fp8.solve(weight)
    for form in (one, two):
        back = unpack(pack(form))
        assert torch.equal(back.dense(), form.dense())
        assert abs(pack(form).nbytes - form.nbytes) <= 4 * 20  # the sums, which the kernel wants


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (72, 136), (33, 100)])
def test_cuda_gives_what_the_cpu_gives(rows: int, n: int, k: int) -> None:
    weight, bias = torch.randn(n, k), torch.randn(n).bfloat16()
    x = torch.randn(rows, k).bfloat16()
    for form, slack in ((w8a8.solve(weight), 0.02), (fp8.solve(weight), 0.05)):
        layer = make_linear(pack(form), bias, dtype=torch.bfloat16).to("cuda")
        out = layer(x.cuda())
        wanted = x.double() @ unpack(pack(form)).dense(torch.float64).t() + bias.double()
        assert relative(out.cpu(), wanted) < slack
        single = torch.cat([layer(row[None].cuda()) for row in x])
        assert relative(single, out) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_rounds_and_sums_as_the_cpu_does() -> None:
    form = int8((64, 128))
    x = torch.randn(40, 128)
    layer = layer_of(form, torch.float32)
    on_cpu = layer.reference(x)
    # Integers are equal; the two scales may be multiplied in another order.
    torch.testing.assert_close(layer.to("cuda")(x.cuda()).cpu(), on_cpu, rtol=1e-6, atol=1e-6)
