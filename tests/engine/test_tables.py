"""Quantized embeddings and heads, from a checkpoint to tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressors.base import CompressionError
from compressors.checkpoint import Checkpoint
from compressors.forms.table import Table
from compressors.memory import MemorySink, materialize
from compressors.pipeline import compress
from compressors.quantize import embed
from compressors.recipe import Recipe
from compressors.tables import tables
from gateway.config import BUILTIN
from gateway.engine.core import Core, Job
from gateway.engine.kernels.grouped import GroupedLinear
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.store import pack
from gateway.engine.kernels.table import TableEmbedding, look_up
from gateway.engine.runner import VariantWeights, build_model, forward_logits
from gateway.engine.tokenizer import Tokenizer
from gateway.errors import ModelError

from .conftest import request, run, small_core, tokens_of

VOCAB = 301  # no multiple of a block
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA = {**_SHAPE, "intermediate_size": 56, "num_key_value_heads": 2}
MODELS = {
    "llama": {**_LLAMA, "tie_word_embeddings": False},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "gemma3_text": {**_LLAMA, "head_dim": 8, "sliding_window": 8},  # scales what it looks up
    "opt": {**_SHAPE, "ffn_dim": 56, "word_embed_proj_dim": 16},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
IDS = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folders: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in folders:
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[arch](**MODELS[arch]))
            folders[arch] = tmp_path_factory.mktemp(arch)
            model.save_pretrained(folders[arch])
        return folders[arch]

    return make


def compressed(folder: Path, level: str) -> MemorySink:
    sink = MemorySink()
    compress(Checkpoint(folder), Recipe.parse(level), sink=sink)
    return sink


def weights(sink: MemorySink) -> VariantWeights:
    packed = {module: pack(form) for module, form in sink.linears.items()}
    return VariantWeights(sink.model_config, sink.tensors, packed, torch.float32)


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("level", ["embed8", "embed4", "int8+embed4"])
@pytest.mark.parametrize("arch", MODELS)
def test_the_engine_computes_the_materialized_model(
    arch: str, level: str, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRESSGATE_NATIVE", "0")  # whose inputs are not rounded
    sink = compressed(made(arch), level)
    model = build_model(weights(sink))
    wanted = logits(materialize(sink))
    torch.testing.assert_close(forward_logits(model, IDS), wanted, rtol=1e-3, atol=1e-3)
    dense = logits(materialize(compressed(made(arch), "fp32")))
    assert 0 < float((wanted - dense).norm() / dense.norm()) < 0.3


@pytest.mark.parametrize("arch", MODELS)
def test_the_native_head_is_near_the_materialized_one(
    arch: str, made: Callable[[str], Path]
) -> None:
    sink = compressed(made(arch), "embed8")
    wanted = logits(materialize(sink))
    got = forward_logits(build_model(weights(sink)), IDS)
    assert float((got - wanted).norm() / wanted.norm()) < 0.02


def test_a_tied_pair_is_stored_and_held_once(made: Callable[[str], Path]) -> None:
    untied, tied = compressed(made("llama"), "embed8"), compressed(made("qwen2"), "embed8")
    assert set(untied.linears) == {"model.embed_tokens", "lm_head"}
    assert set(tied.linears) == {"model.embed_tokens"}
    module = build_model(weights(tied)).module
    embedding = module.get_submodule("model.embed_tokens")
    assert isinstance(embedding, TableEmbedding)
    assert embedding.rows is module.get_submodule("lm_head")


@pytest.mark.parametrize(("level", "share"), [("embed8", 0.52), ("embed4", 0.33)])
def test_resident_bytes_shrink(level: str, share: float) -> None:
    dense = compressed(BUILTIN, "bf16")
    sink = compressed(BUILTIN, level)
    (table,) = sink.linears.values()
    stored = 2 * table.shape[0] * table.shape[1]
    assert table.nbytes <= share * stored
    assert sink.nbytes == dense.nbytes - stored + table.nbytes
    before, after = build_model(weights(dense)), build_model(weights(sink))
    saved = before.resident_bytes - after.resident_bytes
    # The other tensors are held in float32 either way, and so was the dense table.
    assert saved >= 2 * stored - share * stored


def test_greedy_and_sampled_tokens(
    made: Callable[[str], Path], bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's own steps (prefill in chunks, batched decoding) on a quantized table."""
    monkeypatch.setenv("PRESSGATE_NATIVE", "0")
    sink = compressed(made("qwen2"), "int4-rtn-g16+embed4")
    core: Core = small_core()
    core.attach("v", build_model(weights(sink)), bytes_tokenizer)
    prompts = [[5, 6, 7], list(range(20, 44)), [9]]
    sampled = {"temperature": 1.0, "seed": 3}
    jobs = [Job("v", request(p, 8), bytes_tokenizer) for p in prompts]
    jobs += [Job("v", request([5, 6], 8, **sampled), bytes_tokenizer) for _ in range(2)]
    got = [tokens_of(events) for events in run(core, jobs)]
    assert got[3] == got[4]
    assert all(len(tokens) == 8 and max(tokens) < VOCAB for tokens in got)
    reference = materialize(sink)
    for prompt, tokens in zip(prompts, got, strict=False):
        with torch.inference_mode():
            scores = reference(input_ids=torch.tensor([prompt + tokens])).logits[0]
        for at, token in enumerate(tokens, len(prompt) - 1):
            assert float(scores[at].max() - scores[at, token]) < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_looked_up_as_they_are_defined(bits: int) -> None:
    weight = torch.randn(50, 72)
    form = embed.solve(weight, bits=bits)
    layer = make_linear(pack(form), None, dtype=torch.float32)
    assert isinstance(layer, GroupedLinear)
    index = torch.tensor([49, 0, 17, 17, 15, 16])
    torch.testing.assert_close(look_up(layer, index), form.dense()[index], rtol=1e-3, atol=1e-5)
    with pytest.raises(IndexError):
        look_up(layer, torch.tensor([64]))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_to_the_nearest_level(bits: int) -> None:
    weight = torch.randn(40, 72)
    weight[3] = 0
    form = embed.solve(weight, bits=bits)
    assert isinstance(form, Table)
    scale = form.rows.scales[:, form.rows.group_index()]
    low = scale * (0 - form.rows.zeros[:, form.rows.group_index()])
    high = low + scale * (2**bits - 1)
    clipped = torch.minimum(torch.maximum(weight, low), high)
    assert bool(((form.dense() - clipped).abs() <= 0.5001 * scale).all())
    assert not form.dense()[3].any()
    assert float((form.dense() - weight).norm() / weight.norm()) < (0.01 if bits == 8 else 0.1)


def test_long_tables_are_quantized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 72)
    whole = embed.solve(weight, bits=4)
    monkeypatch.setattr("compressors.quantize.embed._WEIGHTS_AT_ONCE", 7 * 72)
    assert torch.equal(embed.solve(weight, bits=4).dense(), whole.dense())


def test_a_table_that_is_not_finite_is_named(tmp_path: Path, made: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = made("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][5, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CompressionError, match="lm_head"):
        compressed(tmp_path, "embed8")


def test_an_embedding_of_another_kind_stays_dense() -> None:
    class Odd(nn.Embedding):
        pass

    class Model(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.head = Odd(8, 4), nn.Linear(4, 8, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    found, left = tables(Model(tied=False))
    assert found == {"head.weight": "head"}
    assert "Odd" in left["table"]
    assert tables(Model(tied=True))[0] == {}


def test_a_table_of_another_shape_is_refused(made: Callable[[str], Path]) -> None:
    good = weights(compressed(made("llama"), "embed8"))
    wrong = {**good.linears, "lm_head": pack(embed.solve(torch.randn(VOCAB, 32), bits=8))}
    with pytest.raises(ModelError, match="table"):
        build_model(VariantWeights(good.config, good.tensors, wrong, good.dtype))
