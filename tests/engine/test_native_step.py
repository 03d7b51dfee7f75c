"""Native operations against float64, over odd shapes; threads and other rows change no bit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressors.forms.rotated import hadamard
from gateway.engine import native_step as native

FOUND = native.operations()
pytestmark = pytest.mark.skipif(FOUND is None, reason="no native steps on this host")
RANDOM = torch.Generator().manual_seed(5)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RANDOM)


def run(args: native.Args, *, threads: int = 1, **inputs: Tensor | int) -> None:
    """One operation; `inputs` are fields of the step."""
    assert FOUND is not None
    numbers = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    program = native.Program(FOUND)
    program.add(args)
    program.finish()
    program.run(native.Step(threads=threads, **numbers))


@dataclass
class Both:
    """An output in both forms."""

    full: Tensor
    half: Tensor

    @classmethod
    def of(cls, *shape: int) -> Both:
        return cls(torch.zeros(shape), torch.zeros(shape, dtype=torch.bfloat16))

    @property
    def fields(self) -> dict[str, int]:
        return {"full": self.full.data_ptr(), "half": self.half.data_ptr()}

    def check(self, wanted: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
        torch.testing.assert_close(self.full.double(), wanted, rtol=rtol, atol=atol)
        torch.testing.assert_close(self.half, self.full.bfloat16())


@pytest.mark.parametrize("n", [1, 16, 45, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_norm_adds_first_and_takes_the_kept_rows(n: int, threads: int) -> None:
    x, add, weight = random(7, n), random(7, n), random(n)
    kept, out = torch.tensor([1, 4, 6]), Both.of(3, n)
    total = x.double() + add
    wanted = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    args = native.Norm(
        x=x.data_ptr(), add=add.data_ptr(), weight=weight.data_ptr(), n=n, kept=1, eps=1e-5,
        **out.fields,
    )  # fmt: skip
    run(args, threads=threads, rows=7, kept=kept, outputs=3)
    out.check(wanted[kept])
    torch.testing.assert_close(x[kept].double(), total[kept])


@pytest.mark.parametrize("gelu", [False, True])
def test_gate(gelu: bool) -> None:
    gate, up, out = random(5, 83) * 8, random(5, 83), Both.of(5, 83)
    gate[0, :6] = torch.tensor([0.0, -90.0, 90.0, -1000.0, 1000.0, float("nan")])
    args = native.Gate(
        gate=gate.data_ptr(), up=up.data_ptr(), n=83, gelu=gelu, **out.fields
    )  # fmt: skip
    run(args, rows=5)
    act = F.gelu(gate.double(), approximate="tanh") if gelu else F.silu(gate.double())
    assert out.full[0, 5].isnan()
    out.full[0, 5] = out.half[0, 5] = act[0, 5] = 0.0
    out.check(act * up, rtol=1e-5, atol=2e-6)


def test_embed_and_scale() -> None:
    table, by = random(9, 21).bfloat16(), random(21)
    ids, x, out = torch.tensor([8, 0, 3, 3]), torch.zeros(4, 21), Both.of(4, 21)
    run(native.Embed(table=table.data_ptr(), out=x.data_ptr(), n=21, bf16=1), rows=4, ids=ids)
    assert torch.equal(x, table[ids].float())
    run(native.Scale(x=x.data_ptr(), by=by.data_ptr(), n=21, **out.fields), rows=4)
    out.check(x.double() * by)
    run(native.Scale(x=x.data_ptr(), n=21, **out.fields), rows=4)
    out.check(x.double())


def test_add_and_pick() -> None:
    x, more, out = random(5, 21), random(5, 21), Both.of(5, 18)
    wanted = x.double() + more
    run(native.Add(x=x.data_ptr(), add=more.data_ptr(), n=21), rows=5, threads=2)
    torch.testing.assert_close(x.double(), wanted)
    columns = torch.randperm(21, generator=RANDOM)[:18].int()
    args = native.Pick(x=x.data_ptr(), columns=columns.data_ptr(), k=21, n=18, **out.fields)
    run(args, rows=5)
    assert torch.equal(out.full, x[:, columns])
    assert torch.equal(out.half, x[:, columns].bfloat16())


@pytest.mark.parametrize(("n", "block"), [(6, 1), (12, 4), (40, 8), (48, 16), (96, 32), (256, 256)])
def test_mix_is_the_hadamard_product(n: int, block: int) -> None:
    x, signs, out = random(3, n), random(n).sign(), Both.of(3, n)
    args = native.Mix(x=x.data_ptr(), signs=signs.data_ptr(), n=n, block=block, **out.fields)
    run(args, rows=3)
    pieces = (x.double() * signs).view(-1, block) @ hadamard(block, x.device).double()
    out.check(pieces.view(3, n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 12), (3, 1, 64), (2, 2, 34)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(heads: int, kv_heads: int, dim: int, normed: bool, dtype: torch.dtype) -> None:
    rows, half = 5, dim // 2
    positions, slots = torch.tensor([0, 1, 7, 500, 4095]), torch.tensor([3, 0, 9, 5, 7])
    query, key, value = (random(rows, h, dim) for h in (heads, kv_heads, kv_heads))
    of_query, of_key = random(dim), random(dim)
    frequency, angles = 10000.0 ** (-torch.arange(half) / half), torch.zeros(rows, dim)
    turned = positions[:, None] * frequency
    cos, sin = ((f(turned.double()) * 1.1)[:, None] for f in (torch.cos, torch.sin))

    def turn(x: Tensor, weight: Tensor) -> Tensor:
        x = x.double()
        if normed:
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    wanted_query, wanted_key = turn(query, of_query), turn(key, of_key)
    keys, values = (torch.zeros(10, kv_heads, dim, dtype=dtype) for _ in range(2))
    angle = native.Angles(
        frequency=frequency.data_ptr(), out=angles.data_ptr(), half=half, scale=1.1
    )
    run(angle, rows=rows, positions=positions)
    args = native.Rotate(
        query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(),
        query_norm=of_query.data_ptr() if normed else None,
        key_norm=of_key.data_ptr() if normed else None,
        angles=angles.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
        heads=heads, kv_heads=kv_heads, dim=dim, bf16=dtype is torch.bfloat16, eps=1e-6,
    )  # fmt: skip
    run(args, rows=rows, slots=slots)
    torch.testing.assert_close(query.double(), wanted_query, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(key.double(), wanted_key, rtol=1e-4, atol=1e-5)
    assert torch.equal(keys[slots], key.to(dtype))
    assert torch.equal(values[slots], value.to(dtype))


SIZE = 4  # of a block


class Attention:
    """Sequences of `lengths` tokens in shuffled blocks; the newest `new` of each are queries."""

    def __init__(self, lengths: list[int], new: list[int], shape: tuple[int, int, int]) -> None:
        self.lengths, self.new = lengths, new
        self.heads, self.kv_heads, self.dim = shape
        counts = [-(-length // SIZE) for length in lengths]
        self.order = torch.randperm(sum(counts), generator=RANDOM).int()
        self.tables = list(torch.split(self.order, counts))
        self.query = random(sum(new), self.heads, self.dim)

    def pool(self, dtype: torch.dtype) -> Tensor:
        return random(len(self.order), SIZE, self.kv_heads, self.dim).to(dtype)

    def segments(self) -> Tensor:
        ends = np.cumsum([0, *self.new])
        return torch.tensor(
            [
                [begin, end, length - (end - begin), table.data_ptr()]
                for (begin, end), length, table in zip(
                    pairwise(ends.tolist()), self.lengths, self.tables, strict=True
                )
            ]
        )

    def run(self, keys: Tensor, values: Tensor, window: int | None, threads: int = 1) -> Both:
        half = keys.dtype is torch.bfloat16
        assert FOUND is not None
        segments, out = self.segments(), Both.of(*self.query.shape)
        args = native.Attend(
            query=self.query.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
            heads=self.heads, kv_heads=self.kv_heads, dim=self.dim, block_size=SIZE,
            window=window or 0, bf16=half, pairs=half and FOUND.pairs, scale=0.3, **out.fields,
        )  # fmt: skip
        run(args, rows=len(self.query), segments=segments, count=len(segments), threads=threads)
        return out

    def wanted(self, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        outs = []
        for query, length, table in zip(
            torch.split(self.query, self.new), self.lengths, self.tables, strict=True
        ):
            group = self.heads // self.kv_heads
            k, v = (
                pool[table].flatten(0, 1)[:length].double().repeat_interleave(group, 1)
                for pool in (keys, values)
            )
            at = torch.arange(length - len(query), length)
            behind = at[:, None] - torch.arange(length)
            hidden = (behind < 0) | (behind >= (window or length))
            scores = torch.einsum("ihd,jhd->hij", query.double(), k) * 0.3
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hij,jhd->ihd", weights, v))
        return torch.cat(outs)


SHAPES = [(4, 2, 12), (3, 3, 64), (7, 1, 80), (10, 2, 128)]
CASES = [
    pytest.param([1, 5, 70, 301], [1, 1, 1, 1], id="decode"),
    pytest.param([7, 150, 300], [7, 150, 100], id="prefill"),
    pytest.param([9, 40, 1, 3], [2, 5, 1, 1], id="mixed"),
]


@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize(("lengths", "new"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(
    lengths: list[int],
    new: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    window: int | None,
) -> None:
    case = Attention(lengths, new, shape)
    keys, values = case.pool(dtype), case.pool(dtype)
    out = case.run(keys, values, window)
    bound = 1e-5 if dtype is torch.float32 else 0.03  # bf16 queries and weights of several rows
    out.check(case.wanted(keys, values, window), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_attention_depends_on_nothing_else(dtype: torch.dtype) -> None:
    case = Attention([30, 400, 500], [1, 200, 1], (6, 2, 32))
    keys, values = case.pool(dtype), case.pool(dtype)
    together = case.run(keys, values, None, threads=1).full
    assert torch.equal(case.run(keys, values, None, threads=2).full, together)
    for index, rows in enumerate(torch.split(together, case.new)):
        alone = Attention([case.lengths[index]], [case.new[index]], (6, 2, 32))
        alone.tables, alone.query = [case.tables[index]], torch.split(case.query, case.new)[index]
        assert torch.equal(alone.run(keys, values, None, threads=2).full, rows)


def test_buffers_begin_a_line_of_the_cache_and_are_kept() -> None:
    buffers = native.Buffers(3)
    for width in (1, 45, 768, 100_000):
        for dtype in (torch.float32, torch.bfloat16):
            flat = buffers.get("x", width, dtype)
            assert flat.data_ptr() % 64 == 0
            assert flat.shape == (3 * width,)
            assert not flat.any()
            assert buffers.get("x", width, dtype) is flat


def test_python_calls_run_in_their_place() -> None:
    assert FOUND is not None
    table, x, out = random(3, 8), torch.zeros(2, 8), Both.of(2, 8)
    ids = torch.tensor([2, 1])
    program = native.Program(FOUND)
    program.add(native.Embed(table=table.data_ptr(), out=x.data_ptr(), n=8))
    program.call(lambda step: rows(x, step).mul_(2))
    program.add(native.Scale(x=x.data_ptr(), n=8, **out.fields))
    program.finish()
    program.run(native.Step(ids=ids.data_ptr(), rows=2, threads=1))
    assert torch.equal(out.full, table[ids] * 2)


def rows(x: Tensor, step: native.Step) -> Tensor:
    return native.rows_of(x.view(-1), step.rows, x.shape[1])
