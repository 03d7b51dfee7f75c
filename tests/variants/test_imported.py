"""Checkpoints that come compressed, through the kernels that serve them: nothing made dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from compressors.export.formats import write_packed
from compressors.export.packed import FormatError
from gateway.engine.runner import build_model, forward_logits
from gateway.variants.artifact import imported_weights
from tests.compressors.export.folders import SMALL, compressed, group_form
from tests.compressors.export.test_awq import awq_folder
from tests.compressors.export.test_compressed_tensors import FORMS

LLAMA = LlamaConfig(**SMALL, num_key_value_heads=1)


def gptq(folder: Path) -> nn.Module:
    model, parts = compressed(LLAMA, lambda _, w: group_form(w))
    write_packed(folder, parts, form="gptq", tokenizer_from=folder.parent)
    return model


def compressed_tensors(kind: str) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model, parts = compressed(LLAMA, FORMS[kind][0])
        write_packed(folder, parts, form="compressed-tensors", tokenizer_from=folder.parent)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "schemes", "near"),
    [
        pytest.param(gptq, {"grouped"}, 0.02, id="gptq"),
        pytest.param(awq_folder, {"grouped"}, 0.02, id="awq"),
        pytest.param(compressed_tensors("int4-g32"), {"grouped"}, 0.02, id="ct-int4"),
        pytest.param(compressed_tensors("int8-channel"), {"grouped"}, 0.02, id="ct-int8"),
        pytest.param(compressed_tensors("w8a8"), {"int8"}, 0.02, id="ct-w8a8"),
        pytest.param(compressed_tensors("fp8"), {"float8"}, 0.02, id="ct-fp8"),
    ],
)
def test_logits_are_those_of_the_dense_reference(
    make: Callable[[Path], nn.Module], schemes: set[str], near: float, tmp_path: Path
) -> None:
    """`near`: of the logits' range; integer kernels round their inputs to 8 bits, FP8's to bf16."""
    torch.manual_seed(0)
    reference = make(tmp_path / "out")
    weights = imported_weights(tmp_path / "out", torch.float32)
    assert {stored.scheme for stored in weights.linears.values()} == schemes
    assert len(weights.linears) == 14
    assert not any(name.endswith("_proj.weight") for name in weights.tensors)
    ids = torch.randint(128, (2, 9))
    expected = reference(ids).logits
    logits = forward_logits(build_model(weights), ids)
    assert float((logits - expected).abs().max()) < near * float(expected.abs().max())


def test_a_dense_folder_is_not_imported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="is not compressed"):
        imported_weights(tmp_path, torch.float32)
