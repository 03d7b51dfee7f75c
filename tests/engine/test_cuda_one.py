"""The CUDA step of one row: its attention, and what ends in digits, against float64.

On a CUDA device where there is one (marker gpu); on the CPU through Triton's interpreter, where
Triton is installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from compressors.tensor import LinearForm
from gateway.engine.cuda import attend, attend_one, digits
from gateway.engine.cuda.staging import Batch
from gateway.engine.decoder import Norm, Rotary
from gateway.engine.kernels import codes
from gateway.engine.kernels.codes import DigitTiling
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.nested import NestedLinear
from gateway.engine.kernels.on_cuda import PackedCall
from gateway.engine.kernels.store import pack, unpack
from gateway.engine.kernels.triton_digits import Digits, Heads
from tests.engine.cuda_parts import Paged, attended, device, error, rms
from tests.engine.kernels.forms import grouped, nested

__all__ = ["device"]


def value(found: Digits) -> Tensor:
    """float64 [1, K]; the sums of the digits must be right, too."""
    planes, grid = found.planes.cpu().double(), found.grid.cpu().double()
    group = planes.shape[1] // len(grid)
    sums = planes.view(3, -1, group).sum(2).T * grid[:, :3, 0]
    torch.testing.assert_close(grid[:, :3, 1], sums, rtol=1e-6, atol=1e-30)
    assert bool((grid[:, 3] == 0).all())
    scales = grid[:, :3, 0].T.repeat_interleave(group, 1)
    return (planes * scales).sum(0, keepdim=True)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("n", "group"), [(256, 128), (384, 128), (96, 32)])
def test_a_norm_in_digits(device: str, added: bool, n: int, group: int) -> None:
    x = torch.randn(1, n, device=device) * torch.exp(torch.randn(1, n, device=device) * 2)
    delta = torch.randn(1, n, device=device) if added else None
    norm = Norm(torch.rand(n, device=device) + 0.5, 1e-5)
    total = x.double() + (0.0 if delta is None else delta.double())
    found = digits.add_norm(x, delta, norm, group)
    assert error(x, total) < 1e-6
    assert error(value(found), rms(total, norm).cpu()) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_times_up_in_digits(device: str, activation: str) -> None:
    both = torch.randn(1, 2 * 640, device=device) * 4
    gate, up = both.split(640, -1)
    g = gate.double()
    active = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    found = digits.gated(gate, up, activation, 128)
    assert error(value(found), (active * up.double()).cpu()) < 1e-6


def test_digits_of_nothing_and_of_what_is_not_finite(device: str) -> None:
    x = torch.zeros(1, 256, device=device)
    norm = Norm(torch.ones(256, device=device), 1e-5)
    assert bool((value(digits.add_norm(x, None, norm, 128)) == 0).all())
    gate = torch.ones(1, 256, device=device)
    gate[0, 200] = float("nan")
    found = digits.gated(gate, torch.ones(1, 256, device=device), "silu", 128)
    assert bool(found.grid[0].isfinite().all())
    assert bool(found.grid[1, :3].isnan().all())


@pytest.mark.parametrize("sizes", [(4, 2, 12), (8, 2, 64), (6, 2, 128), (5, 5, 40)])
@pytest.mark.parametrize(("window", "splits"), [(0, 3), (50, 2), (0, 1)])
def test_one_token_attends_to_its_context(
    device: str, sizes: tuple[int, int, int], window: int, splits: int
) -> None:
    heads, kv_heads, dim = sizes
    paged = Paged([200], kv_heads, dim, device)
    scratch = attend.make_scratch(1, heads, kv_heads, dim, torch.device(device))
    setting = attend.Shape(heads, 0.3, window), replace(scratch, splits=splits)
    query = torch.randn(1, heads * dim, device=device)
    for length in (1, 2, 64, 65, 200):
        found = attend_one.decode_one(query, _staged(paged, length - 1), paged.pool, setting)
        keys, values = paged.of(0, length)
        assert isinstance(found, Tensor)
        assert error(found[0], attended(query[0], keys, values, length - 1, setting[0])) < 1e-5


def _staged(paged: Paged, position: int) -> Batch:
    device = paged.tables[0].device
    at = torch.tensor([position], dtype=torch.int32, device=device)
    return Batch(torch.zeros(1, dtype=torch.int64, device=device), at, at, paged.tables)


def test_attention_in_digits(device: str) -> None:
    heads, kv_heads, dim = 8, 2, 64
    assert attend_one.splits_into(heads, kv_heads, dim, 128)
    assert not attend_one.splits_into(6, 2, dim, 128)
    assert not attend_one.splits_into(2, 2, dim, 128)
    paged = Paged([150], kv_heads, dim, device)
    scratch = attend.make_scratch(1, heads, kv_heads, dim, torch.device(device))
    setting = attend.Shape(heads, 0.2, 0), scratch
    query = torch.randn(1, heads * dim, device=device)
    plain = attend_one.decode_one(query, _staged(paged, 149), paged.pool, setting)
    found = attend_one.decode_one(query, _staged(paged, 149), paged.pool, setting, 128)
    assert isinstance(plain, Tensor)
    assert isinstance(found, Digits)
    assert error(value(found), plain.cpu()) < 1e-6


def test_the_angles_of_a_token(device: str) -> None:
    rotary = Rotary(torch.rand(20, device=device), 1.25)
    position = torch.tensor([91], dtype=torch.int32, device=device)
    found = attend_one.turns(position, rotary).double().cpu()
    angle = 91 * rotary.frequency.double().cpu().repeat(2)
    sign = torch.ones(40).index_fill_(0, torch.arange(20), -1.0)
    wanted = torch.stack((angle.cos(), sign * angle.sin())) * 1.25
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


PRODUCTS: dict[str, tuple[LinearForm, int]] = {}
torch.manual_seed(0)
PRODUCTS["int4"] = grouped((70, 512), group=128, zeros="whole"), 128
PRODUCTS["int4-fraction"] = grouped((33, 192), group=64, zeros="fraction"), 64
PRODUCTS["int4-symmetric"] = grouped((48, 640), group=128), 128
PRODUCTS["int8"] = grouped((40, 512), bits=8, group=512), 128
PRODUCTS["int8-groups"] = grouped((40, 256), bits=8, group=64, zeros="whole"), 64
PRODUCTS["int2"] = grouped((32, 128), bits=2, group=64, zeros="whole"), 64
PRODUCTS["int3"] = grouped((35, 256), bits=3, group=128, zeros="whole"), 128
PRODUCTS["int7"] = grouped((16, 256), bits=7, group=128, zeros="whole"), 128
PRODUCTS["nested"] = nested((40, 128)), 32
PRODUCTS["far"] = grouped((16, 128), group=64, zeros="far"), 64
PRODUCTS["order"] = grouped((40, 128), group=32, zeros="whole", perm=True), 0
PRODUCTS["ragged"] = grouped((17, 100), group=20, zeros="whole"), 0


def _call(form: LinearForm, device: str, bias: Tensor | None) -> PackedCall:
    layer = make_linear(pack(form), bias, dtype=torch.bfloat16).to(device)
    assert isinstance(layer, GroupedLinear | NestedLinear)
    columns = (layer if isinstance(layer, GroupedLinear) else layer.child).columns
    return PackedCall(layer.packed(), columns, layer.in_features, layer.bias)


@pytest.mark.parametrize("pieces", [1, 2])  # two: not all columns come out even
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_of_codes_and_digits(
    device: str, kind: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, group = PRODUCTS[kind]
    for name in ("_FOUR_DIGITS", "_EIGHT_DIGITS"):
        monkeypatch.setattr(codes, name, (DigitTiling(4, pieces, 64, 1),) * 5)
    bias = torch.randn(form.shape[0]).bfloat16()
    call = _call(form, device, bias)
    assert call.group == group
    if not group:
        return
    weight = unpack(pack(form)).dense(torch.float64)
    x = (torch.randn(1, form.shape[1]) * torch.exp(torch.randn(1, form.shape[1]))).to(device)
    row = digits.add_norm(x, None, Norm(torch.ones(form.shape[1], device=device), 1e-5), group)
    wanted = value(row) @ weight.T + bias.double()
    assert error(call.one(row).cpu(), wanted) < 6e-3


def test_a_token_in_digits_that_is_not_finite(device: str) -> None:
    call = _call(PRODUCTS["int4"][0], device, None)
    gate = torch.ones(1, 512, device=device)
    gate[0, 7] = float("inf")
    row = digits.gated(gate, torch.ones(1, 512, device=device), "silu", 128)
    assert not bool(torch.isfinite(call.one(row)).any())


@pytest.mark.parametrize("bits", [4, 8])
def test_heads_are_turned_and_stored(device: str, bits: int) -> None:
    heads, kv_heads, dim, k = 4, 2, 64, 256
    total = (heads + 2 * kv_heads) * dim
    form = grouped((total, k), bits=bits, group=128 if bits == 4 else k)
    bias = torch.randn(total).bfloat16()
    call = _call(form, device, bias)
    keys, values = torch.full((2, 3, 4, kv_heads, dim), 9.0, device=device).bfloat16()
    rotary = Rotary(torch.rand(dim // 2, device=device), 1.25)
    position = torch.tensor([37], dtype=torch.int32, device=device)
    write = torch.tensor([6], dtype=torch.int32, device=device)
    norm = Norm(torch.ones(k, device=device), 1e-5)
    row = digits.add_norm(torch.randn(1, k, device=device), None, norm, 128)
    turns = attend_one.turns(position, rotary)
    out = call.one(row, heads=Heads(turns, write, keys, values, heads, kv_heads, dim))
    wanted = value(row) @ unpack(pack(form)).dense(torch.float64).T + bias.double()
    query, key, own = wanted[0].split([heads * dim, kv_heads * dim, kv_heads * dim])

    def turned(x: Tensor) -> Tensor:
        angle = 37 * rotary.frequency.double().cpu()
        low, high = x.view(-1, dim).chunk(2, -1)
        cos, sin = angle.cos() * 1.25, angle.sin() * 1.25
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    assert error(out.cpu().view(heads, dim), turned(query)) < 6e-3
    assert error(keys.flatten(0, 1)[6].cpu(), turned(key)) < 6e-3
    assert error(values.flatten(0, 1)[6].cpu(), own.view(kv_heads, dim)) < 6e-3
    for pool in (keys, values):
        assert int((pool == 9).all(-1).sum()) == 11 * kv_heads
