"""The real auto-gptq package: imported, run on the bundled model, its result read natively."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import gateway
from compressors.base import CompressionError, Report
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.export.model import CollectingSink
from compressors.export.writer import write_gptq
from compressors.model import weight_of
from compressors.pipeline import compress
from compressors.quantize import autogptq_compat
from compressors.quantize.autogptq import AutoGptqSettings, build
from compressors.quantize.autogptq_compat import AutoGptqMissing, load, running
from compressors.recipe import Recipe, RecipeError
from compressors.tensor import Grouped

BUILTIN = Path(gateway.__file__).parent / "builtin" / "docs-17m"
FAST = AutoGptqSettings(bits=4, group=32)
needs_autogptq = pytest.mark.skipif(
    find_spec("auto_gptq") is None, reason="pip install 'pressgate[auto-gptq]' to run this"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def save(config: PretrainedConfig, folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(folder)
    return model


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "eos_token_id": 2,
        }
        | changes
    )


def random_windows(vocabulary: int = 96, count: int = 6, length: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (length,), generator=generator) for _ in range(count)]


# -- the compatibility module -----------------------------------------------------------------


@needs_autogptq
def test_the_import_leaves_other_libraries_as_they_were() -> None:
    modules = {name: importlib.import_module(name) for name, _, _ in autogptq_compat.DROPPED}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    package = load()
    assert package.__version__ == "0.7.1"
    for name, module in modules.items():
        assert vars(module).keys() == before[name].keys()
    assert load() is package


@needs_autogptq
def test_running_puts_everything_back_even_after_an_error() -> None:
    load()
    base = importlib.import_module("auto_gptq.modeling._base")
    before = (base.CUDA_0, torch.cuda.synchronize)
    block = nn.Linear(2, 2)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")

    def inside() -> None:
        with running([block], torch.device("cpu"), stop):
            assert base.CUDA_0.type == "cpu"
            torch.cuda.synchronize()  # raises on a machine without CUDA, were it not replaced
            output = block(torch.ones(3, 2))
            assert isinstance(output, tuple)
            assert output[0].shape == (3, 2)
            block(torch.ones(3, 2))

    with pytest.raises(RuntimeError, match="stop"):
        inside()
    assert (base.CUDA_0, torch.cuda.synchronize) == before
    assert isinstance(block(torch.ones(3, 2)), Tensor)
    assert calls == [1, 1]


def test_without_the_extra_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(_name: str) -> None:
        return None

    monkeypatch.setattr("importlib.util.find_spec", missing)
    with pytest.raises(AutoGptqMissing, match=r"pip install 'pressgate\[auto-gptq\]'"):
        build(tmp_path, random_windows(), CollectingSink())


# -- building ---------------------------------------------------------------------------------


@needs_autogptq
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(llama(), id="llama"),
        pytest.param(
            Qwen2Config(**llama().to_dict() | {"model_type": "qwen2"}), id="qwen2-with-biases"
        ),
        pytest.param(
            OPTConfig(
                vocab_size=96,
                hidden_size=64,
                ffn_dim=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                word_embed_proj_dim=64,
            ),
            id="opt",
        ),
    ],
)
def test_architectures_come_out_whole(config: PretrainedConfig, tmp_path: Path) -> None:
    model = save(config, tmp_path / "dense")
    sink = CollectingSink()
    report = build(tmp_path / "dense", random_windows(), sink, settings=FAST)
    parameters = dict(model.named_parameters())
    covered = {f"{module}.weight" for module in sink.forms} | set(sink.tensors)
    assert covered == set(parameters)
    for name, tensor in sink.tensors.items():
        assert torch.equal(tensor, parameters[name]), name
    assert {row.module for row in report.layers} == set(sink.forms)
    for module, form in sink.forms.items():
        weight = weight_of(model.get_submodule(module))
        assert form.shape == tuple(weight.shape)
        # Columns that no input reaches (OPT's ReLU) are zeroed; another layer's would be 1.4 off.
        assert float((form.dense() - weight).norm() / weight.norm()) < 0.7, module
    assert report.calibration_tokens == 6 * 32


class Watched:
    """Inputs and result of every layer that auto-gptq quantized, seen from outside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load()
        gptq = importlib.import_module("auto_gptq.quantization.gptq").GPTQ
        self.shapes: list[tuple[int, ...]] = []
        add_batch = gptq.add_batch

        def watch(solver: Any, inputs: Tensor, outputs: Tensor) -> None:
            self.shapes.append(tuple(inputs.shape))
            add_batch(solver, inputs, outputs)

        monkeypatch.setattr(gptq, "add_batch", watch)


@needs_autogptq
def test_every_block_sees_every_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tuple hook, blocks after the first would see one window of each batch."""
    save(llama(num_hidden_layers=3), tmp_path / "dense")
    watched = Watched(monkeypatch)
    build(tmp_path / "dense", random_windows(count=6), CollectingSink(), settings=FAST)
    assert {shape[1:] for shape in watched.shapes} == {(32, 64), (32, 96)}
    per_layer = sum(shape[0] for shape in watched.shapes) / (3 * 7)
    assert per_layer == 6


@needs_autogptq
def test_calibration_beats_rounding_on_the_layers_output(tmp_path: Path) -> None:
    """GPTQ's promise, on the first layer, whose inputs are the same for both."""
    model = save(llama(), tmp_path / "dense")
    sink = CollectingSink()
    windows = random_windows(count=16)
    build(tmp_path / "dense", windows, sink, settings=AutoGptqSettings(bits=3, group=32))
    inputs: list[Tensor] = []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = layer.register_forward_hook(lambda _m, args, _o: inputs.append(args[0].detach()))
    with torch.no_grad():
        model(torch.stack(windows))
    hook.remove()
    x = inputs[0].reshape(-1, 64)
    weight = weight_of(layer).detach()
    form = sink.forms["model.layers.0.self_attn.q_proj"]
    rounded = round_to_nearest(weight, 3, 32)
    assert (x @ (form.dense() - weight).t()).norm() < 0.97 * (x @ (rounded - weight).t()).norm()


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric, in auto-gptq's own scheme: the scale spans -max to +max."""
    blocks = weight.reshape(weight.shape[0], -1, group)
    scale = 2 * blocks.abs().amax(-1, keepdim=True) / (2**bits - 1)
    half = 2 ** (bits - 1)
    return (scale * ((blocks / scale).round() + half).clamp(0, 2**bits - 1).sub(half)).reshape(
        weight.shape
    )


@needs_autogptq
def test_the_same_windows_give_the_same_codes(tmp_path: Path) -> None:
    save(llama(), tmp_path / "dense")
    first, second = CollectingSink(), CollectingSink()
    build(tmp_path / "dense", random_windows(), first, settings=FAST)
    build(tmp_path / "dense", random_windows(), second, settings=FAST)
    for module, form in first.forms.items():
        again = second.forms[module]
        assert isinstance(form, Grouped)
        assert isinstance(again, Grouped)
        assert torch.equal(form.codes, again.codes)
        assert torch.equal(form.scales, again.scales)


@needs_autogptq
def test_progress_rises_to_one_and_can_cancel(tmp_path: Path) -> None:
    save(llama(), tmp_path / "dense")
    shares: list[float] = []
    build(
        tmp_path / "dense",
        random_windows(),
        CollectingSink(),
        settings=FAST,
        progress=lambda share, _: shares.append(share),
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) == len(shares)

    class CancelledError(Exception):
        pass

    def cancel(share: float, _what: str) -> None:
        if share > 0.5:
            raise CancelledError

    sink = CollectingSink()
    with pytest.raises(CancelledError):
        build(tmp_path / "dense", random_windows(), sink, settings=FAST, progress=cancel)
    assert not sink.forms


@needs_autogptq
@pytest.mark.parametrize(
    ("config", "settings", "windows", "message"),
    [
        pytest.param(
            Qwen3Config(**llama().to_dict() | {"model_type": "qwen3", "head_dim": 32}),
            FAST, random_windows(), "does not know model type 'qwen3'", id="unknown-type",
        ),
        pytest.param(
            GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, eos_token_id=2),
            FAST, random_windows(), "current GPT2LMHeadModel", id="positional-blocks",
        ),
        pytest.param(
            llama(intermediate_size=80), FAST, random_windows(),
            r"layers\.0\.mlp\.gate_proj: 80x64", id="shape",
        ),
        pytest.param(
            llama(), AutoGptqSettings(group=128), random_windows(),
            "no whole number of groups of 128", id="group",
        ),
        pytest.param(llama(), AutoGptqSettings(bits=5), random_windows(), "not 5", id="bits"),
        pytest.param(llama(), FAST, [], "windows of one length", id="no-windows"),
        pytest.param(
            llama(), FAST, [torch.zeros(8).long(), torch.zeros(9).long()],
            "windows of one length", id="ragged",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said_and_nothing_comes_out(
    config: PretrainedConfig,
    settings: AutoGptqSettings,
    windows: list[Tensor],
    message: str,
    tmp_path: Path,
) -> None:
    save(config, tmp_path / "dense")
    sink = CollectingSink()
    with pytest.raises(CompressionError, match=message):
        build(tmp_path / "dense", windows, sink, settings=settings)
    assert not sink.tensors
    assert not sink.forms


def test_the_level_stands_alone_and_is_symmetric() -> None:
    step = Recipe.parse("int4-autogptq-g128").steps[0]
    assert (step.bits, step.group, step.symmetric) == (4, 128, True)
    assert Recipe.parse("int4-autogptq-g128").needs_calibration
    for stack in ("depth-75+int4-autogptq-g128", "lowrank-80+int4-autogptq-g128"):
        with pytest.raises(RecipeError, match="whole model"):
            Recipe.parse(stack)


# -- the bundled model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> tuple[CollectingSink, Report]:
    """The bundled model quantized by the real package on a few windows of random tokens."""
    sink = CollectingSink()
    torch.set_num_threads(1)
    windows = torch.stack(random_windows(vocabulary=8192, count=4, length=128))
    recipe = Recipe.parse("int4-autogptq-g128")
    calibration = Calibration(windows, "random tokens")
    return sink, compress(Checkpoint(BUILTIN), recipe, sink=sink, calibration=calibration)


@needs_autogptq
@pytest.mark.slow
def test_the_bundled_model_is_quantized_and_shares_its_other_tensors(
    bundled: tuple[CollectingSink, Report],
) -> None:
    sink, report = bundled
    dense = Checkpoint(BUILTIN)
    assert report.recipe == "int4-autogptq-g128"
    assert len(sink.forms) == 8 * 7
    assert sink.model_config == dense.config
    for name, tensor in sink.tensors.items():
        assert torch.equal(tensor, dense.tensor(name))
        assert tensor.dtype == torch.bfloat16
    for module, form in sink.forms.items():
        assert isinstance(form, Grouped)
        assert (form.bits, form.group, form.symmetric) == (4, 128, True)
        exact = dense.tensor(f"{module}.weight").float()
        assert float((form.dense() - exact).norm() / exact.norm()) < 0.25
    assert all(row.bytes_after < row.bytes_before * 0.3 for row in report.layers)


@needs_autogptq
@pytest.mark.slow
def test_what_is_served_is_what_auto_gptqs_own_layers_compute(
    bundled: tuple[CollectingSink, Report], tmp_path: Path
) -> None:
    """The result, exported and put into auto-gptq's own layers: same weights, same logits."""
    sink, _ = bundled
    folder = write_gptq(tmp_path / "packed", sink.model(), tokenizer_from=BUILTIN)
    stored = load_file(folder / "model.safetensors")
    kind = load().nn_modules.qlinear.qlinear_cuda_old.QuantLinear
    native = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    for module, form in sink.forms.items():
        n, k = form.shape
        layer = kind(4, 128, k, n, bias=False, weight_dtype=torch.float32)
        layer.load_state_dict(
            {part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        )
        # The checkpoint holds float16 scales: at most half a unit in their last place is lost.
        assert torch.allclose(layer(torch.eye(k)).t(), form.dense(), rtol=2**-10, atol=1e-7), module
        theirs.set_submodule(module, layer)
        native.get_submodule(module).weight.data = form.dense()
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        assert torch.allclose(theirs(ids).logits, native(ids).logits, atol=0.02)
