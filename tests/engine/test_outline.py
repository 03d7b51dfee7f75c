"""Models built from outlines answer bit for bit as the models they were outlined from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.checkpoint import Checkpoint
from compressors.kv_scheme import KVScheme
from compressors.memory import MemorySink
from compressors.pipeline import compress
from compressors.recipe import Recipe
from gateway.config import BUILTIN
from gateway.engine import outlines
from gateway.engine.base import TokenEvent
from gateway.engine.core import Job
from gateway.engine.kernels.store import pack
from gateway.engine.model import Model, VariantWeights, build_model
from gateway.engine.native_step import operations
from gateway.engine.outline import Outline, build, outline_of
from gateway.engine.outlines import open_model
from gateway.engine.runner import forward_logits
from gateway.engine.runners import make_runner, same, settle
from gateway.engine.tokenizer import Tokenizer
from gateway.errors import ModelError
from tests.engine.conftest import VOCAB, request, run, small_core, tokens_of, weights_of

pytestmark = pytest.mark.skipif(operations() is None, reason="no native steps on this host")
Checkpoints = Callable[[str], Path]
IDS = torch.randint(0, VOCAB, (2, 60), generator=torch.Generator().manual_seed(3))


def packed(folder: Path, level: str) -> VariantWeights:
    sink = MemorySink()
    compress(Checkpoint(folder), Recipe.parse(level), sink=sink)
    linears = {module: pack(form) for module, form in sink.linears.items()}
    return VariantWeights(sink.model_config, sink.tensors, linears, torch.bfloat16)


def again(model: Model, weights: VariantWeights) -> Model:
    """Built from the outline as a file would hold it."""
    outline = outline_of(settle(model))
    assert outline is not None
    return build(Outline.model_validate_json(outline.model_dump_json()), weights)


def check(weights: VariantWeights, tolerance: float) -> None:
    model = build_model(weights)
    other = again(model, weights)
    assert same(model, other)
    wanted, found = forward_logits(model, IDS), forward_logits(other, IDS, make_runner)
    centred = wanted - wanted.mean(-1, keepdim=True)
    assert float((found - wanted).norm() / centred.norm()) < tolerance
    assert other.layout == model.layout
    assert other.step.windows == model.step.windows
    assert other.resident_bytes == model.resident_bytes


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families(checkpoint: Checkpoints, family: str) -> None:
    check(weights_of(checkpoint(family)), 1e-4)


@pytest.mark.parametrize("level", ["int8", "int4-rtn-g16+embed8", "embed4"])
def test_compressed_levels(checkpoint: Checkpoints, level: str) -> None:
    check(packed(checkpoint("qwen2"), level), 0.1)


def test_a_tied_table_is_held_once() -> None:
    """The bundled model's head is its embedding."""
    weights = packed(BUILTIN, "embed8")
    assert "lm_head" not in weights.linears
    check(weights, 0.1)


@pytest.mark.parametrize("bits", [None, 8])
def test_windows_between_steps_change_nothing(
    checkpoint: Checkpoints, bytes_tokenizer: Tokenizer, bits: int | None
) -> None:
    """Their pool is their own: what runs meanwhile finds its keys and values where they were."""
    kv = None if bits is None else KVScheme(bits)
    weights = replace(weights_of(checkpoint("llama")), kv=kv)
    core = small_core()
    core.attach("a", again(build_model(weights), weights), bytes_tokenizer)
    (wanted,) = run(core, [Job("a", request([5, 6, 7], 20), bytes_tokenizer)])
    job, found = Job("a", request([5, 6, 7], 20), bytes_tokenizer), list[TokenEvent]()
    core.submit(job)
    while core.busy:
        for _, event in core.step():
            assert isinstance(event, TokenEvent)
            found.append(event)
        core.logits("a", IDS[:1, :30])
    assert tokens_of(found) == tokens_of(wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_keys_and_values(checkpoint: Checkpoints, bits: int) -> None:
    check(replace(weights_of(checkpoint("llama")), kv=KVScheme(bits)), 1e-3)


def test_norms_that_are_stored_less_one(checkpoint: Checkpoints) -> None:
    """As Gemma's; no family whose parts are read today has both."""
    weights = weights_of(checkpoint("llama"))
    model = build_model(weights)
    outline = outline_of(model)
    assert outline is not None
    less = {
        name: tensor - 1 if "norm" in name else tensor for name, tensor in weights.tensors.items()
    }
    offset = outline.model_dump()
    for part in (offset, *offset["layers"]):
        part["norm"]["offset"] = True
        if "after" in part:
            part["after"]["offset"] = True
    other = build(Outline.model_validate(offset), replace(weights, tensors=less))
    wanted, found = forward_logits(model, IDS), forward_logits(other, IDS, make_runner)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "opt", "gpt2", "gpt_neox"])
def test_what_values_do_not_say_has_no_outline(checkpoint: Checkpoints, family: str) -> None:
    assert outline_of(settle(build_model(weights_of(checkpoint(family))))) is None


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_other_tensors_than_the_outlined_are_refused(checkpoint: Checkpoints, change: str) -> None:
    weights = weights_of(checkpoint("llama"))
    outline = outline_of(build_model(weights))
    assert outline is not None
    tensors = dict(weights.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["model.layers.1.mlp.other.weight"] = tensors[name]
    else:
        tensors[name] = tensors[name][0]
    with pytest.raises(ModelError, match="not the outlined model"):
        build(outline, replace(weights, tensors=tensors))


class TestKept:
    """Which variants a kept outline is used for."""

    @pytest.fixture
    def weights(self, checkpoint: Checkpoints) -> VariantWeights:
        return replace(weights_of(checkpoint("llama")), identity="one")

    def test_the_second_load_builds_from_it(self, weights: VariantWeights, tmp_path: Path) -> None:
        first = open_model(weights, tmp_path)
        assert not first.outlined
        second = open_model(weights, tmp_path)
        assert second.outlined
        assert same(first, second)

    @pytest.mark.parametrize(
        "other",
        [
            {"identity": "two"},
            {"identity": ""},
            {"kv": KVScheme(8)},
            {"dtype": torch.bfloat16},
        ],
        ids=str,
    )
    def test_it_is_of_one_variant(
        self, weights: VariantWeights, tmp_path: Path, other: dict[str, object]
    ) -> None:
        open_model(weights, tmp_path)
        assert not open_model(replace(weights, **other), tmp_path).outlined  # type: ignore[arg-type]

    def test_it_is_of_these_kernels(
        self, weights: VariantWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_model(weights, tmp_path)
        monkeypatch.setattr(outlines, "_surroundings", lambda: ("other kernels",))
        assert not open_model(weights, tmp_path).outlined

    def test_without_native_code_none_is_used(
        self, weights: VariantWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_model(weights, tmp_path)
        monkeypatch.setenv("PRESSGATE_NATIVE", "0")
        assert not open_model(weights, tmp_path).outlined

    @pytest.mark.parametrize("damage", ["cut", "field", "layers"])
    def test_a_damaged_one_is_made_anew(
        self, weights: VariantWeights, tmp_path: Path, damage: str
    ) -> None:
        open_model(weights, tmp_path)
        (file,) = tmp_path.glob("*.json")
        text = file.read_text()
        if damage == "cut":
            file.write_text(text[:100])
        else:
            document = json.loads(text)
            if damage == "field":
                document["code"] = "x"
            else:
                document["layers"].pop()
            file.write_text(json.dumps(document))
        assert not open_model(weights, tmp_path).outlined
        assert file.read_text() == text


_SECOND_START = """
import sys
from pathlib import Path
import torch
from compressors.checkpoint import Checkpoint
from gateway.engine.core import Core, Job, LocalOptions
from gateway.engine.outlines import open_model
from gateway.engine.tokenizer import load_tokenizer
from gateway.variants.artifact import dense_weights
from gateway.variants.facts import facts_of
from tests.engine.conftest import request, run, tokens_of

folder, kept = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint = Checkpoint(folder)
facts = facts_of(kept, checkpoint, None)
weights = dense_weights(
    checkpoint, torch.bfloat16, identity=checkpoint.source_digest, names=facts.names
)
core = Core(LocalOptions(kv_bytes=8 << 20))
tokenizer = load_tokenizer(folder)
core.attach("a", open_model(weights, kept), tokenizer)
(events,) = run(core, [Job("a", request([5, 6, 7]), tokenizer)])
print(tokens_of(events), "transformers.modeling_utils" in sys.modules, "sympy" in sys.modules)
"""


def test_a_second_start_imports_no_model_code(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _SECOND_START, str(BUILTIN), str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[0].endswith("True True")
    assert said[1] == said[0].replace("True True", "False False")
