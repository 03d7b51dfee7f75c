"""Reading a model as parts: put together naively, in float64, they give transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.engine import runners
from gateway.engine.decoder import Attention, Decoder, GatedMlp, Norm
from gateway.engine.kv_quant import make_pool
from gateway.engine.runner import Runner, build_model, forward_logits
from tests.engine.conftest import VOCAB, weights_of

Checkpoints = Callable[[str], Path]


IDS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(3))


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def _linear(module: torch.nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x.float()).double()
    return out


def _turn(x: Tensor, parts: Decoder) -> Tensor:
    """x [length, heads, dim]."""
    at = torch.arange(x.shape[0], dtype=torch.float64)
    angle = (at[:, None] * parts.rotary.frequency.double())[:, None]
    cos, sin = angle.cos() * parts.rotary.scale, angle.sin() * parts.rotary.scale
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def _attend(x: Tensor, a: Attention, parts: Decoder) -> Tensor:
    h = _norm(x, a.norm)
    q, k, v = (_linear(m, h).view(len(x), -1, a.dim) for m in (a.query, a.key, a.value))
    if a.query_norm is not None and a.key_norm is not None:
        q, k = _norm(q, a.query_norm), _norm(k, a.key_norm)
    q, k = _turn(q, parts), _turn(k, parts)
    k, v = (t.repeat_interleave(a.heads // a.kv_heads, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * a.scale
    behind = torch.arange(len(x))[:, None] - torch.arange(len(x))
    hidden = (behind < 0) | (behind >= (a.window or len(x)))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return _linear(a.output, torch.einsum("hij,jhd->ihd", weights, v).flatten(1))


def _assemble(parts: Decoder, ids: Tensor) -> Tensor:
    x = parts.embed(ids[0]).double()
    for block in parts.blocks:
        x = x + _attend(x, block.attention, parts)
        h, mlp = _norm(x, block.norm), block.mlp
        assert isinstance(mlp, GatedMlp)
        assert mlp.activation == "silu"
        x = x + _linear(mlp.down, F.silu(_linear(mlp.gate, h)) * _linear(mlp.up, h))
    return _linear(parts.head, _norm(x, parts.norm))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_parts_are_the_model(checkpoint: Checkpoints, family: str) -> None:
    model = build_model(weights_of(checkpoint(family)))
    assert model.decoder is not None
    with torch.inference_mode():
        found = _assemble(model.decoder, IDS).float()
    torch.testing.assert_close(found, forward_logits(model, IDS)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt2", "gpt_neox"])
def test_what_is_built_otherwise_is_not_read(checkpoint: Checkpoints, family: str) -> None:
    assert build_model(weights_of(checkpoint(family))).decoder is None


def test_parts_that_give_other_logits_do_not_serve(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A thin runner that computes the model serves it; one that computes another does not."""
    (tmp_path / "thin_for_test.py").write_text(
        "from gateway.engine.runner import Runner\n"
        "def make(model, pool, max_batch):\n"
        "    runner = Runner(model, pool, max_batch=max_batch)\n"
        "    decode = runner.decode\n"
        "    runner.decode = lambda batch: decode(batch) * model.decoder.rotary.scale\n"
        "    return runner\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(runners.THIN, "cpu", "thin_for_test")
    model = build_model(weights_of(checkpoint("llama")))
    assert model.decoder is not None
    assert runners.settle(model).decoder is model.decoder
    off = replace(model.decoder, rotary=replace(model.decoder.rotary, scale=1.5))
    settled = runners.settle(replace(model, decoder=off))
    assert settled.decoder is None
    pool = make_pool(model.layout, 4, 16, "cpu")
    assert isinstance(runners.make_runner(settled, pool, max_batch=2), Runner)
