"""Real levels of the bundled model, written and loaded by the real library: the same logits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gateway
from compressors.checkpoint import Checkpoint
from compressors.export.formats import open_packed, write_packed
from compressors.export.model import CompressedModel
from compressors.memory import MemorySink, materialize
from compressors.pipeline import compress
from compressors.recipe import Recipe

BUILTIN = Path(gateway.__file__).parent / "builtin" / "docs-17m"
TEXT = "The function returns a list of the names that the module defines."


def exported(level: str, folder: Path) -> torch.nn.Module:
    """Writes `folder`; returns the level with dense weights."""
    sink = MemorySink()
    compress(Checkpoint(BUILTIN), Recipe.parse(level), sink=sink)
    model = CompressedModel(sink.model_config, sink.tensors, sink.linears)
    write_packed(folder, model, form="compressed-tensors", tokenizer_from=BUILTIN)
    return materialize(sink).eval()


@pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
@pytest.mark.parametrize(
    ("level", "most"),
    [("int8", 1e-3), ("int4-rtn-g128-sym", 1e-3), ("w8a8", 0.01), ("fp8", 0.08)],
)
def test_transformers_computes_what_the_level_does(level: str, most: float, tmp_path: Path) -> None:
    """`most`: mean KL in nats; rounded inputs, unknown to our dense weights, cost some."""
    ours = exported(level, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map="cpu"
    ).eval()
    with torch.no_grad():
        p, q = (model(ids).logits[0].log_softmax(-1) for model in (ours, theirs))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < most
    again = open_packed(tmp_path / "out")
    assert again is not None
    assert again.level == level
