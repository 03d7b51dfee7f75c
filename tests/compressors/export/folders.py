"""Small compressed models and the folders made of them, shared by the tests of every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from compressors.export.model import CollectingSink, CompressedModel
from compressors.model import decoder_blocks, linears, weight_of
from compressors.tensor import Grouped, LinearForm

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def group_form(weight: Tensor, bits: int = 4, group: int = 32, seed: int = 0) -> Grouped:
    """Round to nearest, symmetric, scales that float16 holds, written out plainly."""
    n, k = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -k % group)).reshape(n, -1, group)
    scales = (padded.abs().amax(-1) / (2 ** (bits - 1) - 1)).clamp_min(1e-4).half().float()
    codes = (padded / scales[..., None]).round() + 2 ** (bits - 1)
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).reshape(n, -1)[:, :k].contiguous()
    return Grouped(codes, scales, torch.full_like(scales, 2 ** (bits - 1)), bits, min(group, k))


def compressed(
    config: PretrainedConfig, quantize: Callable[[str, Tensor], LinearForm] | None = None
) -> tuple[nn.Module, CompressedModel]:
    """A random model whose block linears are quantized, and its compressed parts."""
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.normal_(0, 0.1)
    sink = CollectingSink()
    sink.config(json.loads(config.to_json_string(use_diff=False)))
    blocks = decoder_blocks(model)
    for index, block in enumerate(blocks.modules):
        for name, module in linears(block):
            form = quantize(name, weight_of(module)) if quantize else group_form(weight_of(module))
            weight_of(module).copy_(form.dense())
            sink.linear(f"{blocks.prefix(index)}.{name}", form)
    for name, tensor in model.named_parameters():
        if name.removesuffix(".weight") not in sink.forms:
            sink.tensor(name, tensor.detach())
    return model, sink.model()


def filled(model: CompressedModel, config: PretrainedConfig) -> nn.Module:
    """A dense transformers model of what was read."""
    fresh = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, tensor in model.tensors.items():
            fresh.get_parameter(name).copy_(tensor)
        for name, form in model.forms.items():
            weight_of(fresh.get_submodule(name)).copy_(form.dense())
    return fresh


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
