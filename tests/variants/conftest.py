"""A small random model that real levels are built of, and the settings to do so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gateway.config import BUILTIN, Build, Cache, Model, Settings
from tests.support.gateway_process import write_texts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in bf16 with the bundled model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=152,  # no multiple of any group
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in BUILTIN.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def tiny_settings(model: Path, folder: Path, levels: tuple[str, ...]) -> Settings:
    """One thread, short texts, and a cache under `folder`."""
    texts = {name: Path(file) for name, file in write_texts(folder).items()}
    return Settings(
        models=(Model(id="tiny", path=str(model)),),
        device="cpu",
        threads=1,
        cache=Cache(dir=folder / "cache"),
        levels=levels,
        build=Build(calibration=texts["calibration"], eval_text=texts["eval_text"]),
    )
