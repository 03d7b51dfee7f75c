"""Held-out windows: the operator's text or the default one, the same for every level."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import gateway
from compressors.base import CompressionError
from compressors.calibration import default_calibration
from compressors.checkpoint import Checkpoint
from gateway.quality.text import held_out

FOLDER = Path(gateway.__file__).parent / "builtin" / "docs-17m"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(FOLDER)


@pytest.fixture(scope="module")
def tokenize():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return lambda text: tokenizer(text)["input_ids"]


def test_the_operators_text_is_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("abcdefgh" * 100)
    chosen = held_out(
        checkpoint, lambda t: [ord(c) for c in t], eval_text=file, windows=5, length=16
    )
    assert chosen.tokens.shape == (5, 16)
    assert {chr(c) for c in chosen.tokens.flatten().tolist()} == set("abcdefgh")
    assert "mine.txt" in chosen.description


def test_windows_fit_the_models_context(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a" * 5000)
    chosen = held_out(checkpoint, lambda t: [1] * len(t), eval_text=file, length=100_000)
    assert chosen.tokens.shape[1] == checkpoint.config["max_position_embeddings"]


@pytest.mark.parametrize("content", [b"", b"ok \xff\xfe", None], ids=["empty", "binary", "missing"])
def test_an_unusable_file_is_named(
    checkpoint: Checkpoint, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CompressionError, match=r"mine\.txt"):
        held_out(checkpoint, lambda t: [ord(c) for c in t], eval_text=file)


def test_the_default_is_repeatable_and_not_what_is_calibrated_on(
    checkpoint: Checkpoint, tokenize
) -> None:
    def chosen(seed: int) -> torch.Tensor:
        return held_out(checkpoint, tokenize, windows=4, length=64, seed=seed).tokens

    first = chosen(0)
    assert first.shape == (4, 64)
    assert torch.equal(first, chosen(0))
    assert not torch.equal(first, chosen(1))
    seen = default_calibration(checkpoint, tokenize, windows=64, length=64).tokens
    assert not phrases(seen) & phrases(first)


def phrases(windows: torch.Tensor) -> set[tuple[int, ...]]:
    """All runs of 32 tokens, but for rulers and blanks, which any text may repeat."""
    runs = windows.unfold(1, 32, 1).reshape(-1, 32).tolist()
    return {tuple(run) for run in runs if len(set(run)) > 12}
