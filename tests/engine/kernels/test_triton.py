"""Triton kernels of packed codes and bytes against float64, and captured layers against eager ones.

On a CUDA device where there is one (marker gpu); on the CPU through Triton's interpreter, where
Triton is installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compressors.tensor import Grouped, LinearForm
from gateway.engine.kernels import float8, int8
from gateway.engine.kernels.codes import packed_tiling
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.joined import join
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.nested import NestedLinear
from gateway.engine.kernels.on_cuda import PackedCall, few_bytes
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.store import pack, unpack
from gateway.engine.kernels.table import look_up
from tests.engine.kernels.forms import every, grouped, nested

_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off"
)
_no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
_cuda = [pytest.mark.gpu, _no_device]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=_interpreted),
        pytest.param("cuda", marks=_cuda),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def build(form: LinearForm, device: str, bias: Tensor | None) -> tuple[PackedCall, Tensor]:
    """The call over a form's stored tensors, and the float64 weight as stored."""
    stored = pack(form)
    layer = make_linear(stored, bias, dtype=torch.bfloat16).to(device)
    assert isinstance(layer, GroupedLinear | NestedLinear)
    columns = (layer if isinstance(layer, GroupedLinear) else layer.child).columns
    call = PackedCall(layer.packed(), columns, layer.in_features, layer.bias)
    return call, unpack(stored).dense(torch.float64)


def relative(out: Tensor, wanted: Tensor) -> float:
    return float((out.double().cpu() - wanted).norm() / wanted.norm())


PACKED: dict[str, LinearForm] = {}
torch.manual_seed(0)
PACKED["g128"] = grouped((70, 256), group=128, zeros="whole")
PACKED["g64"] = grouped((33, 192), group=64, zeros="fraction")
PACKED["g32"] = grouped((48, 96), group=32)
PACKED["far"] = grouped((16, 128), group=64, zeros="far")
PACKED["order"] = grouped((40, 128), group=32, zeros="whole", perm=True)
PACKED["ragged"] = grouped((17, 100), group=20, zeros="whole")
PACKED["narrow"] = grouped((9, 48), group=16)
PACKED["odd"] = grouped((20, 100), group=64)
PACKED["int8"] = grouped((40, 160), bits=8, group=160)
PACKED["int8-groups"] = grouped((40, 256), bits=8, group=64, zeros="whole")
PACKED["int2"] = grouped((32, 128), bits=2, group=64, zeros="whole")
PACKED["int3"] = grouped((35, 256), bits=3, group=128, zeros="whole")
PACKED["int6"] = grouped((16, 128), bits=6, group=64)
PACKED["int7"] = grouped((16, 256), bits=7, group=128, zeros="whole")
PACKED["nested"] = nested((40, 128))
PACKED["nested-order"] = nested((40, 96), perm=True)
PACKED["nested-fraction"] = nested((33, 64), zeros="fraction")


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("rows", [1, 3, 9, 20])
def test_products_of_codes(device: str, kind: str, rows: int) -> None:
    form = PACKED[kind]
    bias = torch.randn(form.shape[0]).bfloat16()
    call, weight = build(form, device, bias)
    x = torch.randn(rows, form.shape[1]).bfloat16()
    out = call(x.to(device))
    assert out.dtype == torch.bfloat16
    exact = x.double() @ weight.T
    wanted = exact + bias.double()
    slack = 2.0**-7 * (x.double().abs() @ weight.abs().T + bias.double().abs())
    assert bool(((out.double().cpu() - wanted).abs() <= slack + 1e-6).all())
    assert relative(out, wanted) < 6e-3


@pytest.mark.parametrize("kind", PACKED)
def test_rows_are_the_stored_weight(device: str, kind: str) -> None:
    call, weight = build(PACKED[kind], device, None)
    rows = call.rows(3, weight.shape[0], torch.float32)
    torch.testing.assert_close(rows.cpu().double(), weight[3:], rtol=1e-6, atol=1e-9)
    index = torch.randint(0, weight.shape[0], (5,))
    picked = call.look_up(index.to(device), torch.float32)
    torch.testing.assert_close(picked.cpu().double(), weight[index], rtol=1e-6, atol=1e-9)


def test_kernels_of_few_tokens_are_used_where_groups_allow() -> None:
    """Each choice is one the kernel can compute: chunks inside groups, whole loads of planes."""
    for kind, form in PACKED.items():
        stored = pack(form)
        layer = make_linear(stored, None, dtype=torch.bfloat16)
        assert isinstance(layer, GroupedLinear | NestedLinear)
        codes = layer.packed()
        for rows in (1, 8, 9, 17, 128):
            tiling = packed_tiling(codes, rows)
            if tiling is None:
                assert kind in {"narrow", "odd"}
                continue
            assert codes.width % tiling.chunk == 0
            assert all(tiling.chunk * width % 128 == 0 or width >= 4 for width in codes.widths)
            assert tiling.chunk % 32 == 0


def test_a_token_does_not_see_its_neighbours(device: str) -> None:
    call, _ = build(PACKED["g128"], device, None)
    x = torch.randn(8, 256).bfloat16().to(device)
    alone = torch.cat([call(row[None]) for row in x])
    x[1::2] *= 1000
    assert torch.equal(call(x)[::2], alone[::2])
    x[1, 5] = float("nan")
    out = call(x)
    assert not torch.isfinite(out[1]).any()
    assert torch.equal(out[::2], alone[::2])


@pytest.mark.parametrize("rows", [1, 3, 9, 20])
@pytest.mark.parametrize(("n", "k"), [(48, 128), (33, 96), (70, 320)])
def test_products_of_bytes(device: str, rows: int, n: int, k: int) -> None:
    codes, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.1
    bias, inputs = torch.randn(n).bfloat16(), torch.rand(k) + 0.5
    x = (torch.randn(rows, k) * torch.rand(rows, 1) * 10).bfloat16()

    def ours(x: Tensor, weight: Tensor, inputs: Tensor | None) -> Tensor:
        moved = None if inputs is None else inputs.to(device)
        parts = (x.to(device), weight.to(device), scales.to(device))
        return few_bytes(*parts, inputs=moved, bias=bias.to(device))

    rounded, steps = int8.round_rows(x, inputs)
    weight = codes.double() * scales.double()[:, None]
    wanted = (rounded.double() * steps.double()) @ weight.T + bias.double()
    assert relative(ours(x, codes, inputs), wanted) < 8e-3
    # The interpreter cuts E4M3 off where hardware rounds: tokens that are E4M3 times 1/8 already.
    x = (torch.randn(rows, k) * 20).clamp(-400, 400).to(torch.float8_e4m3fn).bfloat16() / 8
    x[:, 7] = float8.LARGEST / 8
    real = torch.randn(n, k).to(torch.float8_e4m3fn)
    wanted = x.double() @ (real.double() * scales.double()[:, None]).T + bias.double()
    assert relative(ours(x, real, None), wanted) < 8e-3


def test_bytes_that_are_not_finite_stay_with_their_token(device: str) -> None:
    codes, scales = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40) + 0.1
    x = torch.randn(3, 64).bfloat16()
    x[1, 3] = float("inf")
    parts = (codes.to(device), scales.to(device))
    out = few_bytes(x.to(device), *parts, inputs=None, bias=None)
    assert torch.isfinite(out[::2]).all()
    assert not torch.isfinite(out[1]).any()
    alone = few_bytes(x[1:2].to(device), *parts, inputs=None, bias=None)
    assert not torch.isfinite(alone).any()


def test_an_empty_table_row_set(device: str) -> None:
    call, weight = build(PACKED["g32"], device, None)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    assert call.look_up(nothing, torch.float32).shape == (0, weight.shape[1])


def on_device(form: LinearForm) -> tuple[KernelLinear, Tensor]:
    stored = pack(form)
    layer = make_linear(stored, None, dtype=torch.bfloat16).to("cuda")
    return layer, unpack(stored).dense(torch.float64)


@pytest.mark.gpu
@_no_device
@pytest.mark.parametrize("kind", sorted(every()))
def test_every_layer_is_captured(kind: str) -> None:
    """A graph over new inputs gives what eager calls give, and both what the weight means."""
    layer, weight = on_device(every(48, 128)[kind])
    for rows in (1, 5, 16, 33, 200):
        x = torch.randn(rows, 128).bfloat16().cuda()
        for _ in range(2):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(torch.randn(rows, 128))
        graph.replay()
        eager = layer(x)
        assert torch.equal(out, eager)
        assert relative(eager, x.cpu().double() @ weight.T) < 0.06


@pytest.mark.gpu
@_no_device
def test_memory_and_moves() -> None:
    """A layer on the device keeps its stored bytes only, and comes back unchanged."""
    form = grouped((64, 256), group=128, zeros="whole")
    stored = pack(form)
    layer = make_linear(stored, None, dtype=torch.bfloat16)
    assert isinstance(layer, GroupedLinear)
    size = layer.resident_bytes
    wanted = look_up(layer, torch.arange(64))
    layer.to("cuda")
    assert layer.resident_bytes == size
    torch.testing.assert_close(look_up(layer, torch.arange(64).cuda()).cpu(), wanted)
    layer.to("cpu")
    back = unpack(stored)
    assert isinstance(back, Grouped)
    torch.testing.assert_close(layer.dense_rows(0, 64, torch.float32), back.dense())


@pytest.mark.gpu
@_no_device
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["int3", "int4-sym", "nested", "w8a8", "fp8", "scaled-int4"])
def test_layers_of_one_input_are_one(kind: str, biased: bool) -> None:
    """Joined, they give what they gave alone, before and after, and hold each byte once."""
    forms = [every(n, 128)[kind] for n in (48, 16, 32)]
    if kind == "scaled-int4":
        forms = [replace(form, scale=forms[0].scale) for form in forms]
    if kind == "int4-sym":  # the exponents of the scales differ
        forms[1] = replace(forms[1], scales=forms[1].scales * 64)
    layers = []
    for form in forms:
        bias = torch.randn(form.shape[0]).bfloat16() if biased else None
        layers.append(make_linear(pack(form), bias, dtype=torch.bfloat16).to("cuda"))
    x = torch.randn(5, 128).bfloat16().cuda()
    alone = torch.cat([layer(x) for layer in layers], -1)
    whole = join(layers)
    assert whole is not None
    assert whole.out_features == 96
    for rows in (1, 5):
        torch.testing.assert_close(whole(x[:rows]), alone[:rows], rtol=1e-2, atol=1e-2)
        after = torch.cat([layer(x[:rows]) for layer in layers], -1)
        torch.testing.assert_close(after, alone[:rows], rtol=1e-2, atol=1e-2)
    held = {t.untyped_storage().data_ptr() for t in whole.buffers()}
    own = {t.untyped_storage().data_ptr() for layer in layers for t in layer.buffers()}
    per_column = {"inputs", "scale"}
    shared = {
        t.untyped_storage().data_ptr()
        for layer in layers
        for name, t in layer.named_buffers()
        if name.rpartition(".")[2] in per_column
    }
    assert own - shared <= held


@pytest.mark.gpu
@_no_device
def test_layers_that_differ_are_not_joined() -> None:
    def moved(form: LinearForm) -> KernelLinear:
        return make_linear(pack(form), None, dtype=torch.bfloat16).to("cuda")

    four, eight = moved(grouped((32, 128))), moved(grouped((32, 128), bits=8))
    assert join([four, eight]) is None
    assert join([four, moved(grouped((20, 128)))]) is None
    assert join([four, moved(grouped((32, 256)))]) is None
    ordered = [moved(grouped((32, 128), group=32, perm=True)) for _ in range(2)]
    assert join(ordered) is None
