"""Where the CUDA step does not serve: nothing may depend on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compressors.kv_scheme import KVScheme
from gateway.engine import runners
from gateway.engine.cuda import runner as cuda
from gateway.engine.kv_quant import make_pool
from gateway.engine.runner import Runner, build_model
from tests.engine.conftest import weights_of

Checkpoints = Callable[[str], Path]


def test_without_triton_there_is_no_thin_runner(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda _name: None)
    model = build_model(weights_of(checkpoint("llama")))
    assert model.decoder is not None
    assert cuda.make(model, make_pool(model.layout, 4, 16, "cpu"), 2) is None


def test_quantized_keys_and_values_are_left_to_the_module(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "find_spec", importlib.util.find_spec)
    weights = replace(weights_of(checkpoint("llama")), kv=KVScheme(8, 8))
    model = build_model(weights)
    assert model.decoder is not None
    assert cuda.make(model, make_pool(model.layout, 8, 8, "cpu"), 2) is None


def test_a_thin_runner_that_fails_does_not_serve(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_for_test.py").write_text(
        "def make(model, pool, max_batch):\n    raise RuntimeError('no C compiler')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(runners.THIN, "cpu", "broken_for_test")
    settled = runners.settle(build_model(weights_of(checkpoint("llama"))))
    assert settled.decoder is None
    pool = make_pool(settled.layout, 4, 16, "cpu")
    assert isinstance(runners.make_runner(settled, pool, max_batch=2), Runner)
