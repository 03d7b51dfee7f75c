"""A card says how fast a level decodes with drafts and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressors.checkpoint import Checkpoint
from gateway.app import open_backends
from gateway.commands.options import settings_of
from gateway.config import Engine, Settings
from gateway.engine.local import LocalOptions, LocalRuntime
from gateway.engine.tokenizer import load_tokenizer
from gateway.errors import ConfigError
from gateway.variants.artifact import dense_weights
from gateway.variants.card import Card
from gateway.variants.local_backend import LocalBackend
from gateway.variants.measure import BATCHES, measure_speculation
from tests.variants.conftest import tiny_settings


async def test_rates_with_and_without_come_from_the_engine(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    runtime = LocalRuntime(LocalOptions(kv_bytes=8 << 20, prefix_cache=False))
    try:
        weights = dense_weights(Checkpoint(tiny), torch.bfloat16)
        engine = await runtime.load("@bf16", weights, tokenizer)
        await runtime.load("@twin", weights, tokenizer)  # its drafts are all right
        prompts = [list(range(i, i + 8)) for i in range(10, 90, 10)]
        found = await measure_speculation(engine, runtime.speculate, ["twin"], prompts)
        stats = engine.stats()
    finally:
        await runtime.close()
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert found.drafter == "twin"
    assert found.acceptance == pytest.approx(stats.accepted_tokens / stats.drafted_tokens)
    assert found.acceptance > 0.9
    for rates in (found.decode_tokens_per_s, found.plain_tokens_per_s):
        assert set(rates) == {str(batch) for batch in BATCHES}
        assert min(rates.values()) > 0
    card = Card(speculation=found)
    assert Card.model_validate(card.model_dump(mode="json")) == card


def speculating(settings: Settings, mode: str) -> Settings:
    return settings.model_copy(update={"engine": Engine(speculate=mode)})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("off", None), ("auto", ["lookup"]), ("lookup", ["lookup"]), ("int8", None)],
)
async def test_a_build_is_told_who_may_draft(
    mode: str, expected: list[str] | None, tiny: Path, tmp_path: Path
) -> None:
    settings = speculating(tiny_settings(tiny, tmp_path, ("bf16", "int8", "kv8")), mode)
    async with open_backends(settings) as parts:
        backend = parts.backends[0]
        assert isinstance(backend, LocalBackend)
        await backend.start()
        found = await backend._drafters("bf16")
        assert expected == (None if found is None else [level for level, _ in found])

        async def stored(_level: str) -> bool:
            return True

        backend.stored = stored  # type: ignore[method-assign]
        found = await backend._drafters("bf16")
        if mode in ("auto", "int8"):
            assert found is not None
            assert found[-1] == ("int8", backend.key("int8"))
            assert await backend._drafters("int8") == (
                (("lookup", ""),) if mode == "auto" else None
            )


def test_the_flag_of_serve_is_the_setting() -> None:
    assert settings_of(None).engine.speculate == "auto"
    settings = settings_of(None, speculate="lookup")
    assert settings.engine == Engine(speculate="lookup")


async def test_an_unknown_draft_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    settings = speculating(tiny_settings(tiny, tmp_path, ("bf16", "int8")), "int3")
    with pytest.raises(ConfigError, match=r"engine\.speculate: 'int3' is none of off, .*int8"):
        async with open_backends(settings):
            pass
