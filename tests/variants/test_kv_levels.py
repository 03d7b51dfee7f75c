"""Levels with a quantized KV cache: built, shared, measured and counted as they are served."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from compressors.kv_scheme import KVScheme
from gateway.app import open_backends
from gateway.config import BUILTIN, Build, Cache, Model, Settings
from gateway.engine.base import GenerationRequest, SamplingParams
from gateway.variants.artifact import weights_of
from gateway.variants.local_backend import LocalBackend
from tests.support.gateway_process import write_texts

LEVELS = ("int8", "int8+kv4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in bf16 with the bundled model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in BUILTIN.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def settings_for(model: Path, folder: Path, levels: tuple[str, ...]) -> Settings:
    texts = {name: Path(file) for name, file in write_texts(folder).items()}
    return Settings(
        models=(Model(id="tiny", path=str(model)),),
        device="cpu",
        threads=1,
        cache=Cache(dir=folder / "cache"),
        levels=levels,
        build=Build(calibration=texts["calibration"], eval_text=texts["eval_text"]),
    )


async def test_the_decision_knows_what_a_token_takes(tmp_path: Path) -> None:
    levels = ("fp32", "kv8", "int8+kv8", "int4-gptq-g128+kv4")
    async with open_backends(settings_for(BUILTIN, tmp_path, levels)) as parts:
        (backend,) = parts.backends
        await backend.start()
        plain = backend.kv_bytes_per_token("bf16")
        assert plain == 8 * 6 * 128 * 2  # layers, heads, key and value dims, bytes
        assert backend.kv_bytes_per_token("fp32") == 2 * plain
        eight, four = (backend.kv_bytes_per_token(level) for level in ("kv8", levels[3]))
        assert backend.kv_bytes_per_token("int8+kv8") == eight
        assert plain / eight == pytest.approx(1.91, abs=0.01)
        assert plain / four == pytest.approx(3.66, abs=0.01)


@pytest.mark.slow
async def test_built_shared_measured_and_served(tiny: Path, tmp_path: Path) -> None:
    async with open_backends(settings_for(tiny, tmp_path, LEVELS)) as parts:
        (backend,) = parts.backends
        await backend.start()
        assert isinstance(backend, LocalBackend)
        manifests, cards = {}, {}
        for level in LEVELS:
            cards[level] = await backend.measure(level, lambda _s, _m: None, speed=False)
            artifact = await parts.store.fetch(backend.key(level))
            assert artifact is not None
            manifests[level] = artifact.manifest
            scheme = KVScheme(4) if level == "int8+kv4" else None
            assert weights_of(artifact, torch.bfloat16).kv == scheme

        # The weights of a level and of the same level with a quantized cache are the same blobs.
        plain, with_kv = (manifests[level].tensors for level in ("int8", "int8+kv4"))
        assert {n: t.digest for n, t in plain.items()} == {n: t.digest for n, t in with_kv.items()}

        # The card saw the cache: nothing else differs.
        assert cards["int8+kv4"].kl_nats > cards["int8"].kl_nats

        loaded = await backend.load("int8+kv4")
        assert loaded is not None
        request = GenerationRequest("r", (5, 6, 7), SamplingParams(max_tokens=40, temperature=0.0))
        tokens = [event.token async for event in loaded.engine.generate(request)]
        assert tokens
        await loaded.engine.close()
