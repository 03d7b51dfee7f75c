"""Kernels of the CUDA step against float64.

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

from gateway.engine.cuda import attend, kernels
from gateway.engine.cuda.matvec import gated_matvec, matvec
from gateway.engine.decoder import Norm, Rotary
from tests.engine.cuda_parts import Paged, attended, device, error, rms

__all__ = ["device"]


@pytest.mark.parametrize("n", [48, 128, 200])
@pytest.mark.parametrize("added", [True, False])
def test_norm_of_a_sum_keeps_the_sum(device: str, n: int, added: bool) -> None:
    x, delta = torch.randn(2, 5, n, device=device)
    norm = Norm(torch.rand(n, device=device) + 0.5, 1e-5)
    total = x.double() + (delta.double() if added else 0.0)
    found = kernels.add_norm(x, delta if added else None, norm)
    assert error(found, rms(total, norm)) < 1e-6
    assert error(x, total) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_times_up(device: str, activation: str) -> None:
    both = torch.randn(3, 2 * 1100, device=device) * 4
    gate, up = both.split(1100, -1)
    g = gate.double()
    active = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    assert error(kernels.gated(gate, up, activation), active * up.double()) < 1e-6


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 12), (6, 1, 16), (5, 5, 40)])
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_and_storage(
    device: str, heads: int, kv_heads: int, dim: int, normed: bool
) -> None:
    rows, size = 7, 4
    parts = [heads * dim, kv_heads * dim, kv_heads * dim]
    packed = torch.randn(rows, sum(parts), device=device)
    before = [part.double() for part in packed.split(parts, -1)]
    norms = (
        Norm(torch.rand(dim, device=device) + 0.5, 1e-6),
        Norm(torch.rand(dim, device=device) + 0.5, 1e-6),
    )
    rotary = Rotary(torch.rand(dim // 2, device=device), 1.25)
    positions = torch.tensor([0, 1, 2, 90, 91, 200, 7], dtype=torch.int32, device=device)
    writes = torch.tensor([4, 5, 6, 7, 20, 9, 13], dtype=torch.int32, device=device)
    keys, values = torch.full((2, 6, size, kv_heads, dim), 9.0, device=device)
    query, key, value = packed.split(parts, -1)
    kernels.turn_and_store(
        (query, key, value),
        kernels.Turn(norms if normed else None, rotary),
        (positions, writes),
        (keys, values),
    )

    def turned(x: Tensor, norm: Norm) -> Tensor:
        x = x.view(rows, -1, dim)
        x = rms(x, norm) if normed else x
        angle = (positions.double()[:, None] * rotary.frequency.double())[:, None]
        low, high = x.chunk(2, -1)
        cos, sin = angle.cos() * rotary.scale, angle.sin() * rotary.scale
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    assert error(query, turned(before[0], norms[0]).flatten(1)) < 1e-5
    at = writes.long()
    assert error(keys.flatten(0, 1)[at], turned(before[1], norms[1])) < 1e-5
    assert error(values.flatten(0, 1)[at], before[2].view(rows, kv_heads, dim)) < 1e-6
    untouched = [i for i in range(24) if i not in set(at.tolist())]
    assert bool((keys.flatten(0, 1)[untouched] == 9).all())
    assert bool((values.flatten(0, 1)[untouched] == 9).all())


@pytest.mark.parametrize(("n", "k"), [(7, 48), (16, 1024), (33, 1500)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_of_a_product(device: str, n: int, k: int, bias: bool) -> None:
    x, weight = torch.randn(1, k, device=device), torch.randn(n, k, device=device)
    offset = torch.randn(n, device=device) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert error(matvec(x, weight, offset), wanted) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "k"), [(7, 48), (33, 1500)])
def test_one_row_through_gate_and_up(device: str, n: int, k: int, activation: str) -> None:
    x, weight = torch.randn(1, k, device=device), torch.randn(2 * n, k, device=device) * k**-0.5
    gate, up = F.linear(x.double(), weight.double()).split(n, -1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    assert error(gated_matvec(x, weight, activation), active * up) < 1e-5


@pytest.mark.parametrize(("both", "dim"), [((4, 2), 12), ((8, 1), 16), ((5, 5), 40)])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding_attends_to_its_own_context(
    device: str, both: tuple[int, int], dim: int, window: int, splits: int
) -> None:
    heads, kv_heads = both
    lengths = [1, 64, 65, 200]
    paged = Paged(lengths, kv_heads, dim, device)
    query = torch.randn(4, heads * dim + 8, device=device)[:, : heads * dim]
    scratch = attend.make_scratch(4, heads, kv_heads, dim, torch.device(device))
    setting = attend.Shape(heads, 0.3, window), replace(scratch, splits=splits)
    positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    for _ in range(2):  # what one launch leaves in the scratch must not disturb the next
        found = attend.decode(query, positions, paged.pool, paged.tables, setting)
        for row, length in enumerate(lengths):
            keys, values = paged.of(row, length)
            wanted = attended(query[row], keys, values, length - 1, setting[0])
            assert error(found[row], wanted) < 1e-5


@pytest.mark.parametrize("window", [0, 50])
def test_packed_chunks_attend_to_their_own_context(device: str, window: int) -> None:
    heads, kv_heads, dim = 4, 2, 12
    chunks = [(0, 70), (130, 3), (64, 64)]  # start, length
    paged = Paged([start + length for start, length in chunks], kv_heads, dim, device)
    tiles, begin = [], 0
    for table, (start, length) in enumerate(chunks):
        for off in range(0, length, attend.QUERIES):
            tiles.append([begin + off, min(attend.QUERIES, length - off), start + off, table])
        begin += length
    query = torch.randn(begin, heads * dim, device=device)
    shape = attend.Shape(heads, 0.3, window)
    found = attend.prefill(
        query,
        paged.pool,
        paged.tables,
        torch.tensor(tiles, dtype=torch.int32, device=device),
        shape,
    )
    row = 0
    for table, (start, length) in enumerate(chunks):
        keys, values = paged.of(table, start + length)
        for at in range(start, start + length):
            assert error(found[row], attended(query[row], keys, values, at, shape)) < 1e-5
            row += 1
