"""The kernel that draws tokens, against the host's way of drawing.

On a CUDA device where there is one (marker gpu); on the CPU through Triton's interpreter, where
Triton is installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from gateway.engine.base import SamplingParams
from gateway.engine.cuda import drawing
from gateway.engine.device_sampler import best, draw_by_operations, kernel
from gateway.engine.sampler import COLDEST, RowState, pick

_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off"
)
_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=_interpreted),
        pytest.param("cuda", marks=[pytest.mark.gpu, _cuda]),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("vocab", [2, 300, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_the_kernel_draws_what_the_host_draws(device: str, vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    params = [
        SamplingParams(max_tokens=1, temperature=t, top_k=k, top_p=p, min_p=m, seed=seed)
        for seed, (t, k, p, m) in enumerate(
            product((0.0, 0.7, 1e-9), (0, 1, 40), (1.0, 0.9, 0.2), (0.0, 0.3))
        )
    ]
    # Rounded, so that many are equal and some are zeros of both signs.
    logits = (4 * torch.randn(len(params), vocab, generator=generator)).round() * spread / 4
    uniform = torch.rand(len(params), generator=generator, dtype=torch.float64)
    rows = [RowState(p, (1,)) for p in params]
    for row, number in zip(rows, uniform.tolist(), strict=True):
        row.draw = lambda number=number: number  # type: ignore[method-assign, misc]
    expected = [item.token for item in pick(logits, rows)]
    knobs = torch.stack(
        [
            torch.tensor([max(p.temperature, COLDEST) for p in params], dtype=torch.float64),
            torch.where(torch.tensor([row.random for row in rows]), uniform, -1.0),
            torch.tensor([float(p.top_k or vocab) for p in params], dtype=torch.float64),
            torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=torch.float64),
            torch.tensor([p.min_p for p in params], dtype=torch.float64),
        ]
    )
    for draw in (drawing.draw, draw_by_operations):
        tokens = logits.argmax(-1).to(device)
        draw(logits.to(device), knobs.to(device), tokens)
        assert tokens.tolist() == expected


@pytest.mark.gpu
@_cuda
def test_the_kernel_is_used() -> None:
    assert kernel() is not None


@pytest.mark.parametrize("vocab", [128256, 40001])
def test_the_best_of_wide_rows(device: str, vocab: int) -> None:
    logits = torch.randn(3, vocab).round(decimals=1)  # the first of several equal ones
    logits[2, vocab // 2] = float("nan")
    assert best(logits.to(device)).tolist() == logits.argmax(-1).tolist()
