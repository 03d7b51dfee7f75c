"""Reading checkpoints: what is refused and why, and that a filled skeleton is the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressors import model as models
from compressors.checkpoint import Checkpoint, CheckpointError, resolve
from compressors.model import (
    build_skeleton,
    decoder_blocks,
    linears,
    set_tensor,
    source_names,
    weight_of,
)
from tests.compressors.conftest import CONFIGS

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A Llama checkpoint of the test's own."""
    return Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "llama"))


def fill(checkpoint: Checkpoint) -> nn.Module:
    model = build_skeleton(checkpoint.config)
    for name, stored in source_names(checkpoint, model).items():
        set_tensor(model, name, checkpoint.tensor(stored))
    return model


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_filled_skeleton_is_the_model(arch: str, make_checkpoint: MakeCheckpoint) -> None:
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(arch)
    model = fill(Checkpoint(path))
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    reference = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.arange(40).view(2, 20) % 97
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=tokens).logits, reference(input_ids=tokens).logits
        )


@pytest.mark.parametrize("arch", CONFIGS)
def test_blocks_and_linears_are_found(arch: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint(arch))
    model = build_skeleton(checkpoint.config)
    blocks = decoder_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    found = dict(linears(blocks.modules[0]))
    assert len(found) == {"gpt2": 4, "gpt_neox": 4, "opt": 6, "gpt_neo": 6}.get(arch, 7)
    shapes = {tuple(weight_of(module).shape) for module in found.values()}
    assert all(32 in shape or 64 in shape for shape in shapes)  # one side is the hidden size


def test_building_a_skeleton_leaves_other_modules_alone() -> None:
    build_skeleton({"model_type": "llama", **CONFIGS["llama"]})
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_skeleton_of_another_dtype_leaves_the_default_alone(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code beside it makes tensors while it is built, whose dtype must not change."""
    set_to: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", set_to.append)
    config = {"model_type": arch, **CONFIGS[arch]}
    model = build_skeleton(config, dtype=torch.bfloat16)
    assert set(set_to) <= {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype is torch.bfloat16
    exact = dict(build_skeleton(config, dtype=torch.float32).named_buffers())
    for name, buffer in model.named_buffers():  # rotary frequencies, masks, scales
        assert torch.equal(buffer, exact[name])


def test_tied_weights_stay_tied_and_are_named_once(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint("qwen2"))
    model = fill(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in source_names(checkpoint, model)


@pytest.mark.parametrize("arch", ["gpt2", "opt", "llama"])
def test_a_checkpoint_of_the_base_model_is_understood(
    arch: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """As the oldest repositories on the hub are stored: without the causal LM's prefix."""
    path = make_checkpoint(arch, tie_word_embeddings=True)
    prefix = {"gpt2": "transformer.", "opt": "model.", "llama": "model."}[arch]
    tensors = {n.removeprefix(prefix): t for n, t in load_file(path / "model.safetensors").items()}
    shutil.copy(path / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        ours = fill(Checkpoint(tmp_path))(input_ids=tokens).logits
        theirs = fill(Checkpoint(path))(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs)


def test_shards_are_read_through_the_index(folder: Path) -> None:
    whole = Checkpoint(folder)
    before = {name: whole.tensor(name).clone() for name in whole.names}
    shard(folder)
    sharded = Checkpoint(folder)
    assert len(sharded.files) == 2
    assert sharded.names == whole.names
    assert all(torch.equal(sharded.tensor(n), t) for n, t in before.items())


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: tensors[n].clone() for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_digest_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert Checkpoint(copy).source_digest == Checkpoint(folder).source_digest
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    assert Checkpoint(copy).source_digest != Checkpoint(folder).source_digest


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    shard(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def outside(folder: Path) -> None:
    edit_index(folder, lambda i: i["weight_map"].update(x="../other/model.safetensors"))


def wrong_shard(folder: Path) -> None:
    edit_index(
        folder,
        lambda i: (
            i["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"})
            if i["weight_map"]["model.norm.weight"].startswith("model-00002")
            else i["weight_map"].update({"model.norm.weight": "model-00002-of-00002.safetensors"})
        ),
    )


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "truncated or broken"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "broken"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "broken"),
    "pickle only": (pickle_only, "pickle weights only"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "config without type": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "two files, no index": (
        lambda f: [
            shutil.copy(f / "model.safetensors", f / "a.safetensors"),
            (f / "model.safetensors").rename(f / "b.safetensors"),
        ],
        "several",
    ),
    "index names a path": (outside, "not the name of a shard"),
    "shard missing": (missing_shard, "is missing"),
    "index wrong": (wrong_shard, "where the index says"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_with_the_reason(case: str, folder: Path) -> None:
    breaks, says = BROKEN[case]
    breaks(folder)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(folder)


def test_a_missing_or_misshapen_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n != "model.norm.weight"}, folder / "model.safetensors"
    )
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        source_names(checkpoint, build_skeleton(checkpoint.config))
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"shape \[3\], the config says \[32\]"):
        source_names(checkpoint, build_skeleton(checkpoint.config))


def test_a_repositorys_own_code_never_runs(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    build_skeleton(Checkpoint(folder).config)  # a known type: transformers' own class is used
    config["model_type"] = "evil"
    with pytest.raises(CheckpointError, match="never run"):
        build_skeleton(config)
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": -1}, {"num_attention_heads": 0}, {"hidden_act": "nope"}, {"vocab_size": "x"}],
)
def test_an_absurd_config_is_an_error_of_ours(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        build_skeleton({"model_type": "llama", **CONFIGS["llama"], **change})


def test_resolve_takes_folders_and_refuses_paths_that_are_not(folder: Path) -> None:
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    for bad in ("./nowhere", "/no/such", "~/no such", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve(bad)


def test_a_hub_id_downloads_safetensors_and_text_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, allow=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/some-model", "v1") == folder
    assert (asked["repo"], asked["revision"]) == ("someone/some-model", "v1")
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in asked["allow"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RepositoryNotFoundError", "no such repository"),
        ("GatedRepoError", "restricted"),
        ("RevisionNotFoundError", "no revision"),
        ("LocalEntryNotFoundError", "offline"),
        ("HfHubHTTPError", "download failed"),
        ("OSError", "download failed"),
    ],
)
def test_hub_failures_are_clear(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    def download(*_: Any, **__: Any) -> str:
        if name in ("OSError", "LocalEntryNotFoundError"):
            raise getattr(errors, name, OSError)("boom")
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
        raise getattr(errors, name)("boom", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=says):
        resolve("someone/some-model", "v1")


def test_an_impossible_hub_id_is_refused_without_network() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve("some body/mo del")


def test_tensors_are_mapped_not_copied(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    name = checkpoint.names[0]
    assert checkpoint.tensor(name).data_ptr() == checkpoint.tensor(name).data_ptr()
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.tensor("nope")
    assert models.torch_dtype("bf16") is torch.bfloat16
