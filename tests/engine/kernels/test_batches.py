"""Batches of every size: each kernel's tiles and their remainders give one and the same result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors.tensor import Grouped, LinearForm
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.store import pack, unpack
from tests.engine.kernels.forms import dense, every, grouped

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 19, 20, 24, 31, 40, 70)
PART = 128  # inputs that share one step, at most
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def batched() -> dict[str, LinearForm]:
    """Kinds whose native kernels sum in one order for every number of rows."""
    plain = ("int", "nested", "bf16", "fp16", "fp32", "fp8", "w8a8")
    kinds = [kind for kind in every() if kind.startswith(plain) and kind != "w8a8-outlier"]
    every_kind = every(49, 100)
    return {kind: every_kind[kind] for kind in kinds}


@FLOATS
@pytest.mark.parametrize("kind", sorted(batched()))
def test_a_row_is_the_same_in_every_batch(backend: str, kind: str, dtype: torch.dtype) -> None:
    if backend != "native":
        pytest.skip("torch chooses its order of summation by size")
    layer = make_linear(pack(batched()[kind]), torch.randn(49).to(dtype), dtype=dtype)
    x = torch.randn(max(ROWS), 100).to(dtype)
    whole = layer(x)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS:
            assert torch.equal(layer(x[:rows]), whole[:rows]), (rows, threads)
            assert torch.equal(layer(x[-rows:]), whole[-rows:]), (rows, threads)


def rounded(x: Tensor, form: Grouped) -> Tensor:
    """Inputs as the integer kernels see them, float64: a step for each part of a group."""
    out = x.double().clone()
    for start in range(0, x.shape[1], form.group):
        for first in range(start, min(start + form.group, x.shape[1]), PART):
            part = out[:, first : min(first + PART, start + form.group)]
            step = part.abs().amax(1, keepdim=True).clamp_(min=1e-300) / 127
            part.copy_((part / step).round() * step)
    return out


@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(1, 16, 16), (31, 64, 32), (32, 272, 16), (33, 300, 300), (65, 1056, 1056), (17, 520, 128)],
)
def test_products_are_exact_but_for_the_inputs_steps(
    backend: str, n: int, k: int, group: int
) -> None:
    if backend != "native":
        pytest.skip("through torch inputs are not rounded")
    for bits in (2, 3, 4, 6, 8):
        form = grouped((n, k), bits=bits, group=group, zeros="whole")
        layer = make_linear(pack(form), None, dtype=torch.float32)
        weight = unpack(pack(form)).dense(torch.float64)
        for rows in (1, 2, 7, 8, 12, 23, 70):
            x = torch.randn(rows, k)
            wanted = rounded(x, form) @ weight.T
            error = (layer(x).double() - wanted).abs()
            # A value half way between two levels may go either way: one step of one weight.
            step = float(weight.abs().amax() * x.abs().max()) / 127
            assert float(error.max()) <= step + 1e-5 * float(wanted.abs().max())
            assert float(error.median()) <= 2e-6 * float(wanted.abs().max())


def test_a_wide_layer_takes_its_rows_in_pieces(backend: str) -> None:
    """More inputs than are rounded at a time: pieces meet at their seams."""
    form = grouped((20, 40_000), group=40_000)
    layer = make_linear(pack(form), None, dtype=torch.float32)
    x = torch.randn(30, 40_000)
    torch.testing.assert_close(
        layer(x), torch.cat([layer(row[None]) for row in x]), rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 33), (16, 96), (31, 1600), (40, 5000)])
def test_dot_products_of_floats(backend: str, n: int, k: int, kind: torch.dtype) -> None:
    """Rows of any width, in pieces where they are wide; inputs rounded for bf16 weights only."""
    form = dense((n, k), kind)
    layer = make_linear(pack(form), torch.randn(n), dtype=torch.float32)
    assert layer.bias is not None
    for rows in (1, 2, 5, 6, 7, 16, 24, 25, 70):
        x = torch.randn(rows, k).bfloat16().float()
        wanted = x.double() @ form.weight.double().T + layer.bias.double()
        slack = 1e-5 if kind == torch.float32 or backend == "native" else 1e-2
        size = float((x.double().square() @ form.weight.double().square().T).sqrt().max())
        assert float((layer(x).double() - wanted).abs().max()) <= slack * (size + 1)
