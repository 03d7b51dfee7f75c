"""Layers over stored weights against float64 products of the form's own meaning, both back ends."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from compressors.tensor import Dense, Grouped, LinearForm, Sparse24, StoredLinear
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.store import pack, unpack
from tests.engine.kernels.forms import bitmap, dense, every, grouped, sparse

KINDS = sorted(every())
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def build(form: LinearForm, dtype: torch.dtype, bias: bool = True) -> tuple[KernelLinear, Tensor]:
    """The layer and its float64 weight as stored (scales already rounded)."""
    stored = pack(form)
    vector = torch.randn(form.shape[0]).to(dtype) if bias else None
    return make_linear(stored, vector, dtype=dtype), unpack(stored).dense(torch.float64)


def tolerance(layer: KernelLinear, weight: Tensor, x: Tensor) -> Tensor:
    """What rounding may cost at worst, [M, N]: activations to int8, everything else to bf16."""
    absolute = x.double().abs() @ weight.abs().T
    rounded = 2.0**-7 * absolute
    if {type(module).__name__ for module in layer.modules()} & {"GroupedLinear", "Int8Linear"}:
        rounded += x.double().abs().amax(-1, keepdim=True) / 254 * weight.abs().sum(1)
    return rounded + 2.0**-7 * (0 if layer.bias is None else layer.bias.double().abs()) + 1e-30


def check(layer: KernelLinear, weight: Tensor, x: Tensor, bias: Tensor | None) -> None:
    out = layer(x)
    assert out.dtype == x.dtype
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    assert out.shape == exact.shape
    error = (out.double() - exact).abs()
    assert bool((error <= tolerance(layer, weight, x)).all()), float(error.max())
    usual = (x.double().square() @ weight.square().T).sqrt()  # size of the sum, cancellation aside
    assert float(error.norm()) <= 0.03 * float(usual.norm() + exact.norm()) + 1e-30


def bias_of(layer: KernelLinear) -> Tensor | None:
    """A layer of several gives its bias to one of them."""
    inside = (m.bias for m in layer.modules() if isinstance(m, KernelLinear))
    return next((bias for bias in inside if bias is not None), None)


@FLOATS
@pytest.mark.parametrize("kind", KINDS)
def test_product(backend: str, kind: str, dtype: torch.dtype) -> None:
    layer, weight = build(every()[kind], dtype)
    for rows in (1, 2, 3, 8, 17, 64):
        check(layer, weight, torch.randn(rows, weight.shape[1]).to(dtype), bias_of(layer))


@FLOATS
@pytest.mark.parametrize(("n", "k"), [(1, 4), (15, 36), (16, 128), (17, 520), (300, 64), (64, 384)])
def test_shapes(backend: str, n: int, k: int, dtype: torch.dtype) -> None:
    forms: list[LinearForm] = [grouped((n, k), zeros="whole"), sparse((n, k)), dense((n, k))]
    forms += [bitmap((n, k)), bitmap((n, k), 8)]
    forms += [grouped((n, k), bits=8, group=k), grouped((n, k), bits=8, group=160)]
    for form in forms:
        layer, weight = build(form, dtype, bias=False)
        for rows in (1, 13):
            check(layer, weight, torch.randn(rows, k).to(dtype), None)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 31, 33, 65])
def test_widths_that_fit_no_vector(backend: str, k: int) -> None:
    forms = [
        dense((5, k)),
        bitmap((5, k)),
        bitmap((5, k), 8),
        *(grouped((5, k), bits=bits, group=32) for bits in (3, 4, 8)),
    ]
    for form in forms:
        layer, weight = build(form, torch.float32)
        check(layer, weight, torch.randn(3, k), layer.bias)


def test_leading_dimensions_and_strides(backend: str) -> None:
    for form in (grouped((33, 100)), dense((33, 100)), sparse((33, 100))):
        layer, _ = build(form, torch.float32)
        x = torch.randn(2, 3, 100)
        flat = layer(x.view(6, 100))
        torch.testing.assert_close(layer(x), flat.view(2, 3, 33))
        torch.testing.assert_close(layer(x[0, 0]), flat[0])
        spread = torch.randn(6, 200)[:, ::2]
        torch.testing.assert_close(layer(spread), layer(spread.contiguous()))
        assert layer(x[:0]).shape == (0, 3, 33)


@FLOATS
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_see_its_batch(backend: str, kind: str, dtype: torch.dtype) -> None:
    """An outlier row beside it changes nothing but rounding; natively not a bit of the product."""
    layer, _ = build(every()[kind], dtype)
    x = torch.randn(40, 100).to(dtype)
    alone = torch.cat([layer(row[None]) for row in x])
    x[1::2] *= 1000
    together = layer(x)
    if backend == "native" and kind.startswith("int"):
        assert torch.equal(together[::2], alone[::2])
    slack = 2e-2 if dtype == torch.bfloat16 else 2e-3
    limit = slack * float(alone.abs().max())
    torch.testing.assert_close(together[::2], alone[::2], rtol=slack, atol=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_huge_rows(backend: str, kind: str) -> None:
    layer, weight = build(every()[kind], torch.float32, bias=False)
    x = torch.randn(4, 100)
    x[1] = 0
    x[2] *= 1e30
    x[3] *= 1e-29
    assert not layer(x)[1].any()
    if kind != "fp16":  # 1e30 is no fp16 number
        check(layer, weight, x[2:3], None)
        check(layer, weight, x[3:4], None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_alone(backend: str, bad: float) -> None:
    for form in (grouped((33, 100)), dense((33, 100)), sparse((33, 100))):
        layer, _ = build(form, torch.bfloat16)
        x = torch.randn(3, 100).bfloat16()
        clean = layer(x)
        x[1, 5] = bad
        out = layer(x)
        touched = unpack(pack(form)).dense()[:, 5] != 0
        assert not torch.isfinite(out[1][touched]).any()
        assert torch.equal(out[::2], clean[::2])


def test_threads_change_no_bit(backend: str) -> None:
    forms = [grouped((600, 512), zeros="whole"), dense((600, 512)), sparse((600, 512))]
    forms += [bitmap((600, 512))]
    for form in forms:
        layer, _ = build(form, torch.bfloat16)
        x = torch.randn(9, 512).bfloat16()
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layer(x))
        if backend == "native":
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
        torch.testing.assert_close(results[0], results[2], rtol=1e-2, atol=0.1)


def test_many_callers_at_once(backend: str) -> None:
    layer, _ = build(grouped((96, 256), group=32, zeros="fraction"), torch.float32)
    inputs = [torch.randn(1 + i % 5, 256) for i in range(48)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(layer, inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_storage_is_held_not_copied(backend: str) -> None:
    for form in every().values():
        stored = pack(form)
        layer = make_linear(stored, None, dtype=torch.bfloat16)
        assert layer.resident_bytes == stored.nbytes
        held = {t.data_ptr() for t in layer.buffers()}
        assert held == {t.data_ptr() for t in stored.tensors.values()}


def test_casting_a_model_leaves_codes_and_scales_alone(backend: str) -> None:
    layer, weight = build(grouped((33, 100), zeros="fraction"), torch.float32)
    layer.to(torch.bfloat16).float()
    check(layer, weight, torch.randn(3, 100), layer.bias)


def test_a_deep_copy_computes_from_its_own_memory(backend: str) -> None:
    for form in (grouped((33, 100)), sparse((33, 100))):
        layer, _ = build(form, torch.float32)
        x = torch.randn(3, 100)
        expected = layer(x)
        twin = copy.deepcopy(layer)
        for tensor in layer.buffers():
            tensor.zero_()
        torch.testing.assert_close(twin(x), expected)


def test_a_weight_larger_than_the_scratch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of an expanded weight meet at their seams, for every scheme that expands."""
    monkeypatch.setattr("gateway.engine.kernels.scheme.SCRATCH_BYTES", 40_000)
    for form in (grouped((150, 100), zeros="whole"), sparse((150, 100)), bitmap((150, 100))):
        layer, weight = build(form, torch.float32)
        x = torch.randn(60, 100)
        exact = x.double() @ weight.T + layer.bias.double()  # type: ignore[union-attr]
        out = layer.reference(x)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_bias_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        make_linear(pack(grouped((16, 64))), torch.zeros(15), dtype=torch.float32)


def damage(stored: StoredLinear, suffix: str, tensor: Tensor) -> StoredLinear:
    tensors = dict(stored.tensors) | {suffix: tensor}
    return StoredLinear(stored.scheme, stored.layout, stored.meta, tensors)


@pytest.mark.parametrize(
    ("form", "suffix", "tensor"),
    [
        ("int4", "codes4", torch.zeros(3, 15, 64, dtype=torch.uint8)),
        ("int4", "scales", torch.zeros(3, 4, 16)),
        ("int4", "zeros", torch.zeros(3, 3, 16, dtype=torch.uint8)),
        ("int4-act-order", "columns", torch.zeros(128, dtype=torch.int32)),
        ("int3-act-order", "columns", torch.full((160,), 2**30, dtype=torch.int32)),
        ("bf16", "weight", torch.zeros(33, 99)),
        ("bitmap50", "mask", torch.zeros(33, 12, dtype=torch.uint8)),
        ("bitmap50", "values.weight", torch.zeros(33, 49, dtype=torch.bfloat16)),
        ("bitmap48", "values.weight", torch.zeros(33, 50, dtype=torch.bfloat16)),
        ("sparse", "mask", torch.zeros(33, 12, dtype=torch.uint8)),
        ("sparse", "values.weight", torch.zeros(32, 64, dtype=torch.bfloat16)),
        ("sparse-int8", "values.codes8", torch.zeros(1, 2, 64, dtype=torch.uint8)),
    ],
)
def test_damaged_storage_never_reaches_a_kernel(form: str, suffix: str, tensor: Tensor) -> None:
    stored = pack(every()[form])
    assert suffix in stored.tensors
    with pytest.raises(ValueError, match="stor"):
        make_linear(damage(stored, suffix, tensor), None, dtype=torch.float32)


def test_a_damaged_bitmap_reads_nothing_beyond_its_row(backend: str) -> None:
    """More bits than values: natively the row is what its own values give, without them zero."""
    if backend != "native":
        pytest.skip("the torch path raises by itself")
    form = bitmap((4, 256), values=Dense(torch.ones(4, 128, dtype=torch.bfloat16)))
    stored = pack(form)
    full = torch.full_like(stored.tensors["mask"], 255)
    layer = make_linear(damage(stored, "mask", full), None, dtype=torch.bfloat16)
    out = layer(torch.ones(1, 256).bfloat16())
    assert torch.equal(out, torch.full((1, 4), 128.0).bfloat16())


def test_stacked_compression_computes_what_it_stores(backend: str) -> None:
    values = grouped((64, 128), bits=4, group=32, zeros="fraction")
    form = sparse((64, 256), values)
    assert isinstance(form, Sparse24)
    assert isinstance(form.values, Grouped)
    layer, weight = build(form, torch.bfloat16)
    check(layer, weight, torch.randn(70, 256).bfloat16(), layer.bias)
