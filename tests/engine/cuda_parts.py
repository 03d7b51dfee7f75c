"""What the tests of the CUDA step share: devices, and naive references in float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from gateway.engine import runners
from gateway.engine.cuda import attend
from gateway.engine.decoder import Norm

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off"
)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=interpreted),
        pytest.param("cuda", marks=[pytest.mark.gpu, cuda]),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(runners.THIN, request.param, "gateway.engine.cuda.runner")
    torch.manual_seed(0)
    return str(request.param)


def error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def rms(x: Tensor, norm: Norm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


class Paged:
    """Random keys and values of sequences of some lengths in shuffled blocks, and in order."""

    def __init__(self, lengths: list[int], kv_heads: int, dim: int, device: str) -> None:
        self.size = 4
        self.width = -(-max(lengths) // self.size) + 3
        blocks = torch.randperm(len(lengths) * self.width) + 1
        self.rows = blocks.view(len(lengths), self.width)
        shape = (len(blocks) + 1, self.size, kv_heads, dim)
        self.pool = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.tables = (
            self.rows.to(torch.int32).flatten().to(device),
            torch.tensor([self.width], dtype=torch.int32, device=device),
        )

    def of(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """float64 [length, kv_heads, dim] each."""
        keys, values = (p[self.rows[row].to(p.device)].flatten(0, 1) for p in self.pool)
        return keys[:length].double(), values[:length].double()


def attended(q: Tensor, keys: Tensor, values: Tensor, at: int, shape: attend.Shape) -> Tensor:
    """One query [heads · dim] at position `at`, naively in float64."""
    heads = q.double().view(shape.heads, -1)
    shared = shape.heads // keys.shape[1]
    first = max(0, at + 1 - shape.window) if shape.window else 0
    k = keys[first : at + 1].repeat_interleave(shared, 1)
    v = values[first : at + 1].repeat_interleave(shared, 1)
    weights = (torch.einsum("hd,nhd->hn", heads, k) * shape.scale).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v).flatten()
