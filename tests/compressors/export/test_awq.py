"""AWQ folders, packed here bit by bit from AutoAWQ's description of its GEMM layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from compressors.base import CompressionError
from compressors.export.awq import AwqCheckpoint
from compressors.export.formats import open_packed
from tests.compressors.export.folders import SMALL, edit_config, edit_tensors, filled

LLAMA = LlamaConfig(**SMALL, num_key_value_heads=1)
UP = "model.layers.1.mlp.up_proj"
PLACE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]  # of a word's eight columns, in bits of four


def packed(codes: Tensor) -> Tensor:
    """Codes [rows, columns] of 0..15 as AutoAWQ's int32 words, one code at a time."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for row in range(rows):
        for column in range(columns):
            shift = 4 * PLACE_OF_COLUMN[column % 8]
            words[row, column // 8] |= np.uint32(int(codes[row, column]) << shift)
    return torch.from_numpy(words.view(np.int32))


def quantized(weight: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Round to nearest of weight [N, K] with zero points: stored tensors and what they mean."""
    n, k = weight.shape
    columns = k if group == -1 else group
    grouped = weight.reshape(n, -1, columns)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    dense = scales[..., None] * (codes - zeros[..., None])
    stored = {
        "qweight": packed(codes.reshape(n, k).t()),
        "qzeros": packed(zeros.t()),
        "scales": scales.t().half().contiguous(),
    }
    return stored, dense.reshape(n, k)


def awq_folder(folder: Path, group: int = 32) -> nn.Module:
    """A random model whose block linears are AWQ's; returns its dense reference."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA).eval().requires_grad_(False)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor.contiguous()
            continue
        stored, dense = quantized(tensor, group)
        tensor.copy_(dense)
        head = name.removesuffix("weight")
        tensors |= {head + part: value for part, value in stored.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(LLAMA.to_json_string(use_diff=False))
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    reference: nn.Module = model
    return reference


@pytest.mark.parametrize("group", [32, -1])
def test_an_awq_folder_computes_what_it_was_made_from(group: int, tmp_path: Path) -> None:
    model = awq_folder(tmp_path / "awq", group)
    back = open_packed(tmp_path / "awq")
    assert isinstance(back, AwqCheckpoint)
    assert back.level.startswith("int4-")
    assert back.level.endswith("-gch" if group == -1 else "-g32")
    ids = torch.randint(128, (2, 9))
    assert torch.allclose(filled(back.read(), LLAMA)(ids).logits, model(ids).logits, atol=1e-6)


@pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
def test_the_layout_is_the_one_that_others_read(tmp_path: Path) -> None:
    """compressed-tensors converts AutoAWQ's files: its reading of ours is a third opinion."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    stored, dense = quantized(torch.randn(64, 96), 32)
    codes, scales, zeros = AutoAWQConverter(group_size=32)._convert_gemm_module(
        stored["qweight"], stored["scales"], stored["qzeros"]
    )
    assert zeros is not None
    theirs = (codes.reshape(64, 3, 32) - zeros[..., None]) * scales.float()[..., None]
    assert torch.allclose(theirs.reshape(64, 96), dense, atol=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    awq_folder(tmp_path / "awq")
    return tmp_path / "awq"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"version": "gemv"}, "'gemv' cannot be read; known: gemm", id="version"),
        pytest.param({"bits": 8}, "bits is 8; .* has 4", id="bits"),
        pytest.param({"group_size": 0}, "group_size is 0", id="group"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(change))
    with pytest.raises(CompressionError, match=message):
        open_packed(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda t: t.pop(f"{UP}.qzeros"), f"{UP}: qzeros is missing", id="no-zeros"),
        pytest.param(
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].t().contiguous()}),
            f"{UP}: qweight is torch.int32", id="transposed",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}),
            f"{UP}: scales are", id="scales",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"] * float("nan")}),
            f"{UP}: scales are not finite", id="nan",
        ),
    ],
)  # fmt: skip
def test_malformed_tensors_are_named(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(CompressionError, match=message):
        AwqCheckpoint(folder).read()
