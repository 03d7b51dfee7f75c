"""Levels with a quantized KV cache: built, shared, measured and counted as they are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressors.kv_scheme import KVScheme
from gateway.app import open_backends
from gateway.config import BUILTIN
from gateway.engine.base import GenerationRequest, SamplingParams
from gateway.variants.artifact import weights_of
from gateway.variants.local_backend import LocalBackend
from tests.variants.conftest import tiny_settings

LEVELS = ("int8", "int8+kv4")


async def test_the_decision_knows_what_a_token_takes(tmp_path: Path) -> None:
    levels = ("fp32", "kv8", "int8+kv8", "int4-gptq-g128+kv4")
    async with open_backends(tiny_settings(BUILTIN, tmp_path, levels)) as parts:
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
    async with open_backends(tiny_settings(tiny, tmp_path, LEVELS)) as parts:
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
