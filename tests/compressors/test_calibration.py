"""Calibration and evaluation text: reproducible, disjoint, bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressors.base import CompressionError
from compressors.calibration import (
    Calibration,
    default_calibration,
    default_evaluation,
    from_file,
    from_tokens,
    generate,
    topics_text,
)
from compressors.checkpoint import Checkpoint

MakeCheckpoint = Callable[..., Path]


def tokenize(text: str) -> list[int]:
    return [ord(c) % 97 for c in text]


def test_windows_are_spread_evenly_over_the_text() -> None:
    made = from_tokens(list(range(1000)), "count", windows=4, length=50)
    assert made.tokens[:, 0].tolist() == [0, 250, 500, 750]
    assert torch.equal(made.tokens[2], torch.arange(500, 550))


def test_short_text_gives_fewer_or_shorter_windows_and_too_short_text_is_refused() -> None:
    assert from_tokens(list(range(100)), "x", windows=64, length=30).tokens.shape == (3, 30)
    assert from_tokens(list(range(20)), "x", windows=64, length=512).tokens.shape == (1, 20)
    with pytest.raises(CompressionError, match="only 3 tokens"):
        from_tokens([1, 2, 3], "x", windows=1, length=8)


def test_a_file_is_read_as_text_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words " * 100)
    made = from_file(file, tokenize, windows=2, length=16)
    assert made.tokens.shape == (2, 16)
    assert "text.txt" in made.description
    file.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(CompressionError, match="UTF-8"):
        from_file(file, tokenize)
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(CompressionError, match=bad.name):
            from_file(bad, tokenize)


def test_the_digest_is_of_content_and_shape() -> None:
    tokens = torch.arange(24).view(4, 6)
    same = Calibration(tokens.clone(), "other words")
    assert Calibration(tokens, "x").digest == same.digest
    assert Calibration(tokens.view(6, 4), "x").digest != same.digest
    assert Calibration(tokens + 1, "x").digest != same.digest
    with pytest.raises(CompressionError, match="int64"):
        Calibration(tokens.int(), "x")


def test_generations_are_reproducible_and_sampled(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint("llama"))
    first = generate(checkpoint, windows=3, length=20, seed=1)
    assert first.shape == (3, 20)
    assert torch.equal(first, generate(checkpoint, windows=3, length=20, seed=1))
    assert not torch.equal(first, generate(checkpoint, windows=3, length=20, seed=2))
    assert int(first.max()) < 97
    long = generate(checkpoint, windows=1, length=500, seed=0)
    assert long.shape == (1, 64)  # the model's context


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gpt_neox"])
def test_the_default_text_is_there_for_every_model_and_held_out_text_is_other(
    arch: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = Checkpoint(make_checkpoint(arch))
    calibration = default_calibration(checkpoint, tokenize, windows=6, length=32, seed=0)
    evaluation = default_evaluation(checkpoint, tokenize, windows=6, length=32, seed=0)
    assert calibration.tokens.shape == evaluation.tokens.shape == (6, 32)
    again = default_calibration(checkpoint, tokenize, windows=6, length=32, seed=0)
    assert calibration.digest == again.digest
    rows = {tuple(row) for row in calibration.tokens.tolist()}
    assert not rows & {tuple(row) for row in evaluation.tokens.tolist()}


def test_the_topics_are_split_without_overlap() -> None:
    parts = [topics_text(0), topics_text(1)]
    assert all(len(part) > 100_000 for part in parts)
    first, second = (set(part.split("\n\n")) for part in parts)
    assert not first & second
