"""Random checkpoints: readable by transformers, the same for the same seed, endless answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest.peers import write_gguf
from loadtest.shapes import EOS, SHAPES, _bf16, vocabulary, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shapes") / "tiny", SHAPES["tiny"])


def test_transformers_reads_the_checkpoint_whole(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    shape = SHAPES["tiny"]
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == dict(shape.tensors())
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()
    assert (logits[..., EOS] == 0).all()
    assert (logits.max(-1).values > 0).all()  # so the end is never the best token


@pytest.mark.parametrize(("name", "millions"), [("110m", 134), ("450m", 501)])
def test_the_shapes_have_the_sizes_they_are_known_by(name: str, millions: int) -> None:
    count = sum(int(np.prod(dims)) for _, dims in SHAPES[name].tensors())
    assert round(count / 1e6) == millions


def test_the_tokenizer_has_every_token_and_gives_text_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == SHAPES["tiny"].vocab
    text = "Hello, wörld: the quick\nbrown fox 123"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("quickly").input_ids) < len("quickly")
    vocab, merges = vocabulary(32000)
    assert len(vocab) == 32000
    assert all(left in vocab and right in vocab and left + right in vocab for left, right in merges)


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def weights(seed: int) -> bytes:
        there = write(tmp_path / str(seed), SHAPES["tiny"], seed)
        return (there / "model.safetensors").read_bytes()

    assert weights(0) == (folder / "model.safetensors").read_bytes()
    assert weights(1) != weights(0)


def test_a_whole_folder_is_left_alone_and_a_torn_one_written_again(tmp_path: Path) -> None:
    there = write(tmp_path / "x", SHAPES["tiny"])
    weights = there / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    write(there, SHAPES["tiny"])
    assert weights.stat().st_mtime_ns == stamp
    (there / "config.json").unlink()
    weights.write_bytes(b"torn")
    write(there, SHAPES["tiny"])
    assert weights.stat().st_size > 4


def test_bf16_is_rounded_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (_bf16(values) == theirs).all()


def test_llama_cpp_gets_every_tensor_and_rotary_pairs_as_neighbours() -> None:
    names = [write_gguf._target(n.removesuffix(".weight")) for n, _ in SHAPES["tiny"].tensors()]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "blk.1.attn_q.weight", "output.weight"} <= set(names)
    rows = np.arange(12)[:, None]  # two heads of six: halves (0 1 2 | 3 4 5) and (6 7 8 | 9 10 11)
    turned = write_gguf._interleaved(rows, 2)[:, 0].tolist()
    assert turned == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert write_gguf._interleaved(rows, None) is rows
