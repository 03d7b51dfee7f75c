"""Tiny random checkpoints of many architectures, made with transformers itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GQA},
    "mistral": {**_GQA, "sliding_window": 8},
    "qwen2": {**_GQA, "tie_word_embeddings": True},
    "qwen3": {**_GQA, "head_dim": 16},
    "gemma": {**_GQA, "head_dim": 8},
    "gemma2": {**_GQA, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**_GQA, "head_dim": 8, "sliding_window": 8},
    "opt": {**_SMALL, "ffn_dim": 56, "word_embed_proj_dim": 16},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_SMALL, "rotary_pct": 0.5},
    "gpt_neo": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(arch, **overrides)` → folder of a tiny random model, made once."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(arch: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        key = f"{arch}-{dtype}-{sorted(overrides.items())}"
        if key not in made:
            torch.manual_seed(len(arch))
            config = CONFIG_MAPPING[arch](
                **{**CONFIGS[arch], "initializer_range": 0.3, **overrides}
            )
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):  # zeros by default, which would hide a lost bias
                        parameter.uniform_(-0.1, 0.1)
            folder = tmp_path_factory.mktemp(arch)
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
