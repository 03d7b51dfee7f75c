"""Mixture-of-experts models in the engine: dense as transformers computes them, and compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.memory import MemorySink, materialize
from compressors.pipeline import compress
from compressors.recipe import Recipe
from gateway.engine.core import Job
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.store import pack
from gateway.engine.runner import VariantWeights, build_model, forward_logits
from gateway.engine.tokenizer import Tokenizer
from gateway.variants.artifact import dense_weights

from .conftest import (
    VOCAB,
    reference_model,
    reference_tokens,
    request,
    run,
    small_core,
    tokens_of,
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24, "head_dim": 16},
    "olmoe": {"num_experts": 5},
    "granitemoe": {"num_local_experts": 4},
}
Maker = Callable[[str], Path]
PROMPTS = [[3 + (7 * i * k) % (VOCAB - 3) for k in range(1, 5 * i)] for i in range(1, 5)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            config = CONFIG_MAPPING[family](**_COMMON, **FAMILIES[family])
            made[family] = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[family])
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_experts_continue_as_transformers_does(
    family: str, experts: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder = experts(family)
    reference = reference_model(folder)
    expected = [reference_tokens(reference, prompt, 10) for prompt in PROMPTS]
    core = small_core()
    model = build_model(dense_weights(Checkpoint(folder), torch.float32))
    core.attach("v", model, bytes_tokenizer)
    answers = run(core, [Job("v", request(prompt, 10), bytes_tokenizer) for prompt in PROMPTS])
    assert [tokens_of(events) for events in answers] == expected


@pytest.mark.parametrize("level", ["int8", "int4-gptq-g16", "sparse24-wanda+int8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_compressed_experts_compute_what_their_forms_mean(
    family: str, level: str, experts: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Native kernels round activations, and a router turns a little noise into another expert.
    monkeypatch.setenv("PRESSGATE_NATIVE", "0")
    sink = MemorySink()
    windows = torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint(experts(family))
    recipe = Recipe.parse(level)
    compress(checkpoint, recipe, sink=sink, calibration=Calibration(windows, "random"))
    linears = {name: pack(form) for name, form in sink.linears.items()}
    weights = VariantWeights(sink.model_config, sink.tensors, linears, torch.float32)
    model = build_model(weights)
    kernels = {n for n, m in model.module.named_modules() if isinstance(m, KernelLinear)}
    assert {name for name in linears if ".experts." in name} <= kernels
    ours = forward_logits(model, windows)
    with torch.no_grad():
        meant = materialize(sink)(input_ids=windows).logits
    torch.testing.assert_close(ours, meant, atol=2e-3, rtol=1e-3)
