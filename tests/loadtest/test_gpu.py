"""`compare cuda`: what it counts and shows, and what it says where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loadtest import gpu
from loadtest.__main__ import app
from loadtest.peers.child import Child, EngineError
from loadtest.shapes import SHAPES, Shape


class _Engine:
    """Answers with a speed of its own by level or way, or refuses."""

    def __init__(self, rates: dict[str, float]) -> None:
        self._rates = rates
        self.asked: list[dict[str, Any]] = []

    def ask(self, question: dict[str, Any], _timeout: float) -> dict[str, Any]:
        self.asked.append(question)
        rate = self._rates.get(question.get("level") or question["way"])
        if rate is None:
            raise EngineError("transformers: out of memory")
        return {"tokens": question["tokens"], "seconds": question["tokens"] / rate}


def test_a_way_that_fails_is_skipped_and_said() -> None:
    ours, theirs = _Engine({"bf16": 200.0}), _Engine({"generate": 20.0})
    peer = gpu._Peer(theirs, gpu.WAYS, [])  # type: ignore[arg-type]
    ask = gpu.Ask("decode", "one", 10, ways=("generate", "compiled"))
    row = gpu._against(ours, "bf16", peer, ask, 3)  # type: ignore[arg-type]
    assert row["median"] == pytest.approx({"pressgate": 200.0, "transformers generate": 20.0})
    assert row["ratio"] == pytest.approx(10.0)
    assert len(ours.asked) == len(theirs.asked) - 1 == 4  # compiled was asked once
    assert len(peer.skipped) == 1
    assert "compiled, one" in peer.skipped[0]
    assert "out of memory" in peer.skipped[0]


def test_a_level_that_cannot_be_loaded_is_skipped_but_not_the_first() -> None:
    class Loader(_Engine):
        def ask(self, question: dict[str, Any], _timeout: float) -> dict[str, Any]:
            if question["level"] == "fp8":
                raise EngineError("pressgate: no room")
            return {"bytes": 5}

    skipped: list[str] = []
    assert gpu._load(Loader({}), ["bf16", "fp8", "int8"], skipped) == {"bf16": 5, "int8": 5}  # type: ignore[arg-type]
    assert skipped == ["fp8: pressgate: no room"]
    with pytest.raises(EngineError):
        gpu._load(Loader({}), ["fp8"], [])  # type: ignore[arg-type]


def test_the_tables_show_ratios_both_ways_and_shares_of_the_peak() -> None:
    engine = _Engine({"bf16": 100.0, "int4": 250.0})
    levels = gpu._levels(engine, ["bf16", "int4"], gpu.Ask("decode", "one", 10), 3)  # type: ignore[arg-type]
    row = {"ask": "prefill", "median": {"pressgate": 5.0}, "ratios": {}, "mfu": {"pressgate": 0.5}}
    report = {"rows": [row], "levels": [levels], "bytes": {"bf16": 2e9}, "peak_tflops": 989.0}
    text = "\n".join(gpu.show(report))
    assert "| prefill | 5, 50 % of the peak |" in text
    assert "| one | 100 | 250 (2.50×) |" in text
    assert "bf16 2.0 GB" in text


def test_operations_of_a_prompt() -> None:
    shape = Shape(hidden=8, layers=1, inner=16, heads=2, kv_heads=2, vocab=32)
    weights = 4 * 8 * 8 + 3 * 8 * 16
    scores_and_values = sum(2 * 2 * 8 * (at + 1) for at in range(1000))
    wanted = 2 * 1000 * weights + scores_and_values + 2 * 8 * 32
    assert gpu._flops(shape, 1000) == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("name", gpu.GPU_SHAPES)
def test_what_is_asked_fits_the_context(name: str) -> None:
    shape = gpu.GPU_SHAPES[name]
    for ask in (*gpu.ASKS, *gpu.LEVEL_ASKS):
        found = gpu.fitted(ask, shape)
        assert found.prompt > 0
        whole = found.tokens if found.kind == "prefill" else found.prompt + found.tokens
        assert whole < shape.context
    assert gpu.fitted(gpu.ASKS[-1], gpu.GPU_SHAPES["8b"]).title == "prefill 2,048"


@pytest.mark.parametrize(
    ("flag", "value"), [("--shape", "9b"), ("--peers", "vllm"), ("--levels", " , ")]
)
def test_unknown_names_are_bad_input(flag: str, value: str) -> None:
    with pytest.raises(gpu.BadInput, match=flag):
        CliRunner().invoke(app, ["compare", "cuda", flag, value], catch_exceptions=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    found = CliRunner().invoke(app, ["compare", "cuda", "--shape", "tiny"])
    assert found.exit_code == 1
    assert "no CUDA device" in found.output


def test_every_way_of_transformers_makes_its_tokens() -> None:
    """The worker itself, on the CPU: it counts the tokens that continuous batching returned."""
    folder = Path(gpu.__file__).parent / "peers"
    script = [str(folder / "answers.py"), str(folder / "gpu_worker.py")]
    config = SHAPES["tiny"].config()
    setup = {"config": config, "device": "cpu", "memory_share": 0.02}
    ask = {"batch": 3, "prompt": 20, "tokens": 4}
    with Child("transformers", [sys.executable, *script], {"OMP_NUM_THREADS": "1"}) as child:
        assert {"torch", "transformers"} == set(child.ask(setup)["versions"])
        for way in ("generate", "compiled"):
            found = child.ask(ask | {"kind": "decode", "way": way, "batch": 1})
            assert found["tokens"] == 4
            assert found["seconds"] > 0
        for way in ("generate_batch", "generate", "generate_batch"):
            found = child.ask(ask | {"kind": "streams", "way": way})
            assert found["tokens"] == 12
            assert found["seconds"] > 0
        assert child.ask(ask | {"kind": "prefill", "way": "generate"})["tokens"] == 4
        with pytest.raises(EngineError, match="takes one"):
            child.ask(ask | {"kind": "decode", "way": "generate"})
        with pytest.raises(EngineError, match="cannot be asked"):
            child.ask(ask | {"kind": "_ids"})
