"""Whole folders: written, read back, loaded by others; what is malformed is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

import gateway
from compressors.base import CompressionError
from compressors.export.autogptq_format import GptqFormatError
from compressors.export.model import CompressedModel
from compressors.export.reader import GptqCheckpoint, gptq_config, read_gptq
from compressors.export.writer import write_gptq
from compressors.tensor import Dense, Grouped, LinearForm, LowRank
from tests.compressors.export.folders import (
    SMALL,
    compressed,
    edit_config,
    edit_tensors,
    filled,
    group_form,
)

CONFIGS = [
    pytest.param(LlamaConfig(**SMALL, num_key_value_heads=1), id="llama"),
    pytest.param(LlamaConfig(**SMALL, tie_word_embeddings=True), id="llama-tied"),
    pytest.param(Qwen2Config(**SMALL, num_key_value_heads=2), id="qwen2-with-biases"),
    pytest.param(GPTNeoXConfig(**SMALL), id="neox"),
    pytest.param(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2), id="gpt2-conv1d"),
    pytest.param(
        OPTConfig(
            vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
            num_attention_heads=2, word_embed_proj_dim=64,
        ),
        id="opt",
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_written_folder_reads_back_identically(config: PretrainedConfig, tmp_path: Path) -> None:
    model, parts = compressed(config)
    back = read_gptq(write_gptq(tmp_path / "out", parts))
    assert back.config == parts.config
    assert back.tensors.keys() == parts.tensors.keys()
    for name, tensor in parts.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name
    assert back.forms.keys() == parts.forms.keys()
    for name, form in parts.forms.items():
        read = back.forms[name]
        assert isinstance(form, Grouped)
        assert isinstance(read, Grouped)
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(read, part), getattr(form, part)), f"{name}.{part}"
    ids = torch.randint(128, (2, 9))
    assert torch.equal(filled(back, config)(ids).logits, model(ids).logits)


def test_shards_and_their_index(tmp_path: Path) -> None:
    _, parts = compressed(LlamaConfig(**SMALL))
    folder = write_gptq(tmp_path / "out", parts, shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    stored = {name: file.name for file in files for name in load_file(file)}
    assert stored == index["weight_map"]
    assert read_gptq(folder).forms.keys() == parts.forms.keys()


def test_configs_say_what_others_ask_for(tmp_path: Path) -> None:
    _, parts = compressed(LlamaConfig(**SMALL))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    folder = write_gptq(tmp_path / "out", parts, tokenizer_from=tmp_path)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    assert settings["quant_method"] == "gptq"
    assert settings["checkpoint_format"] == "gptq"
    assert (settings["bits"], settings["group_size"]) == (4, 32)
    assert settings["sym"] is True
    assert settings["desc_act"] is False
    assert "dynamic" not in settings
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / "pytorch_model.bin").exists()


def test_per_channel_and_narrow_layers(tmp_path: Path) -> None:
    def per_channel(_name: str, weight: Tensor) -> Grouped:
        return group_form(weight, group=weight.shape[1])

    _, parts = compressed(LlamaConfig(**SMALL), per_channel)
    folder = write_gptq(tmp_path / "channel", parts)
    settings = gptq_config(folder)
    assert settings is not None
    assert settings.group_size == -1
    for name, form in read_gptq(folder).forms.items():
        assert torch.equal(form.dense(), parts.forms[name].dense())
    # Inputs of 64 and 96 columns in groups of 96: the narrow layers are one group each.
    _, parts = compressed(LlamaConfig(**SMALL), lambda _, w: group_form(w, group=96))
    for name, form in read_gptq(write_gptq(tmp_path / "narrow", parts)).forms.items():
        assert torch.equal(form.dense(), parts.forms[name].dense())


def test_asymmetric_zero_points_switch_to_version_two(tmp_path: Path) -> None:
    _, parts = compressed(LlamaConfig(**SMALL))
    name, form = next(iter(parts.forms.items()))
    assert isinstance(form, Grouped)
    form.zeros[0, 0] = 7
    for version in (None, "gptq"):
        folder = write_gptq(tmp_path / f"{version}", parts, version=version)
        settings = gptq_config(folder)
        assert settings is not None
        assert settings.version == (version or "gptq_v2")
        assert torch.equal(read_gptq(folder).forms[name].dense(), form.dense())
    form.zeros[0, 0] = 0
    back = read_gptq(write_gptq(tmp_path / "zero", parts))
    assert torch.equal(back.forms[name].dense(), form.dense())
    with pytest.raises(GptqFormatError, match="q_proj: zero points"):
        write_gptq(tmp_path / "refused", parts, version="gptq")


def test_linears_left_dense_are_named_and_kept(tmp_path: Path) -> None:
    def all_but_down(name: str, weight: Tensor) -> LinearForm:
        return Dense(weight.clone()) if "c_proj" in name else group_form(weight)

    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2)
    model, parts = compressed(config, all_but_down)
    folder = write_gptq(tmp_path / "out", parts)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert r"-:^transformer\.h\.1\.mlp\.c_proj$" in settings["dynamic"]
    assert len(settings["dynamic"]) == 4
    back = read_gptq(folder)
    ids = torch.randint(128, (2, 9))
    assert torch.equal(filled(back, config)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        pytest.param(
            lambda n, w: LowRank(Dense(w[:, :4]), Dense(w[:4])) if n == "mlp.up_proj"
            else group_form(w), r"layers\.0\.mlp\.up_proj: a lowrank weight", id="low-rank",
        ),
        pytest.param(lambda _, w: Dense(w), "nothing to write", id="dense"),
        pytest.param(
            lambda n, w: group_form(w, bits=8 if n == "mlp.up_proj" else 4),
            r"mlp\.up_proj: 8 bits", id="mixed-bits",
        ),
        pytest.param(
            lambda n, w: group_form(w, group=16 if n == "mlp.up_proj" else 32),
            r"mlp\.up_proj: groups of 16", id="mixed-groups",
        ),
        pytest.param(lambda _, w: group_form(w, bits=5), "q_proj: 5 bits", id="five-bits"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    quantize: Callable[[str, Tensor], LinearForm], message: str, tmp_path: Path
) -> None:
    _, parts = compressed(LlamaConfig(**SMALL), quantize)
    with pytest.raises(GptqFormatError, match=message):
        write_gptq(tmp_path / "out", parts)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    _, parts = compressed(LlamaConfig(**SMALL))
    with pytest.raises(FileExistsError):
        write_gptq(tmp_path, parts)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    _, parts = compressed(LlamaConfig(**SMALL))
    return write_gptq(tmp_path_factory.mktemp("good") / "out", parts)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda t: t.pop(f"{UP}.qzeros"), rf"{UP}: qzeros is missing", id="no-zeros"),
        pytest.param(lambda t: t.pop(f"{UP}.scales"), rf"{UP}: scales is missing", id="no-scales"),
        pytest.param(
            lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: missing", id="no-norm"
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight: shape is \[3\]", id="norm-shape",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()}),
            rf"{UP}: qweight has 7 rows", id="short",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:, :32].clone()}),
            rf"{UP}: scales are", id="narrow",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}),
            rf"{UP}: qweight is torch\.float32", id="dtype",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"] * float("nan")}),
            rf"{UP}: scales are not finite", id="nan",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"] + 9}),
            rf"{UP}: g_idx names groups", id="g_idx",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.9.odd.qweight": torch.zeros(1, dtype=torch.int32)}),
            r"model\.layers\.9\.odd\.qweight: the architecture has no linear", id="stranger",
        ),
        pytest.param(
            lambda t: [t.pop(n) for n in list(t) if n.endswith("qweight")],
            "not one tensor", id="none-packed",
        ),
    ],
)  # fmt: skip
def test_malformed_tensors_are_named(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(GptqFormatError, match=message):
        read_gptq(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"bits": 5}, "bits is 5", id="bits"),
        pytest.param({"bits": True}, "bits is True", id="bool"),
        pytest.param({"group_size": 0}, "group_size is 0", id="group"),
        pytest.param({"group_size": "128"}, "group_size is '128'", id="group-text"),
        pytest.param({"checkpoint_format": "marlin"}, "'marlin' cannot be read", id="marlin"),
        pytest.param({"is_marlin_format": True}, "'marlin' cannot be read", id="old-marlin"),
        pytest.param({"quant_method": "awq"}, "no quantization_config of GPTQ", id="awq"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(change))
    with pytest.raises(GptqFormatError, match=message):
        read_gptq(folder)


def test_broken_or_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CompressionError, match=r"model\.safetensors"):
        read_gptq(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CompressionError, match="pickle"):
        read_gptq(folder)


def test_older_folders_with_quantize_config_only(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    old = {"bits": 4, "group_size": 32, "desc_act": False}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert len(read_gptq(folder).forms) == 14
    (folder / "quantize_config.json").unlink()
    assert gptq_config(folder) is None


def test_packers_zero_biases_and_tied_copies_are_left_out(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda t: t.update({f"{UP}.bias": torch.zeros(96), "model.rotary.inv_freq": torch.ones(4)}),
    )
    names = dict(GptqCheckpoint(folder).tensors())
    assert f"{UP}.bias" not in names
    assert "model.rotary.inv_freq" not in names
    assert "lm_head.weight" in names


@pytest.mark.skipif(
    find_spec("gptqmodel") is None or find_spec("optimum") is None,
    reason="gptqmodel and optimum, which transformers reads GPTQ with, are not installed",
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_and_gptqmodel_load_what_we_write(symmetric: bool, tmp_path: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel

    _, parts = compressed(LlamaConfig(**SMALL))
    if not symmetric:
        for form in parts.forms.values():
            assert isinstance(form, Grouped)
            form.zeros[:, 0] = 0
    config = {**parts.config, "dtype": "float16"}
    parts = CompressedModel(config, {n: t.half() for n, t in parts.tensors.items()}, parts.forms)
    # GPTQModel insists on a tokenizer; whose does not matter.
    tokenizer = Path(gateway.__file__).parent / "builtin" / "docs-17m"
    folder = write_gptq(tmp_path / "out", parts, tokenizer_from=tokenizer)
    ids = torch.randint(128, (1, 9))
    expected = filled(read_gptq(folder), LlamaConfig(**SMALL))(ids).logits
    other = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    assert torch.allclose(other.model(ids).logits.float(), expected, atol=5e-3)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    assert torch.allclose(loaded(ids).logits.float(), expected, atol=5e-2)
