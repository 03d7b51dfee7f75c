"""compressed-tensors folders: ours read by the real library, the library's read by us."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from compressors.base import CompressionError
from compressors.export.compressed_tensors_reader import CompressedTensorsCheckpoint
from compressors.export.compressed_tensors_writer import write_compressed_tensors
from compressors.export.formats import open_packed
from compressors.export.packed import FormatError
from compressors.forms.float8 import Float8
from compressors.forms.int8 import Int8
from compressors.forms.nested import Nested
from compressors.forms.scaled import Scaled
from compressors.tensor import Dense, Grouped, LinearForm, LowRank
from tests.compressors.export.folders import SMALL, compressed, edit_config, edit_tensors, filled
from tests.compressors.export.folders import group_form as symmetric

needs_library = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=1)
UP = "model.layers.1.mlp.up_proj"
Make = Callable[[str, Tensor], LinearForm]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def asymmetric(weight: Tensor, bits: int = 4, group: int = 32) -> Grouped:
    form = symmetric(weight, bits, min(group, weight.shape[1]))
    zeros = torch.randint(0, 2**bits, form.zeros.shape).float()
    return Grouped(form.codes, form.scales, zeros, bits, form.group)


def int8(weight: Tensor) -> Int8:
    scales = weight.abs().amax(1) / 127
    return Int8((weight / scales[:, None]).round().to(torch.int8), scales)


def float8(weight: Tensor) -> Float8:
    scales = weight.abs().amax(1) / 448
    return Float8((weight / scales[:, None]).to(torch.float8_e4m3fn), scales)


def nested(weight: Tensor) -> Nested:
    child = asymmetric(weight)
    return Nested(child, torch.randint(0, 16, child.codes.shape, dtype=torch.uint8))


FORMS: dict[str, tuple[Make, str]] = {
    "int4-g32": (lambda _, w: symmetric(w), "int4-rtn-g32-sym"),
    "int8-channel": (lambda _, w: symmetric(w, 8, w.shape[1]), "int8"),
    "int8-g32": (lambda _, w: symmetric(w, 8), "int8-rtn-g32"),
    "mixed": (lambda n, w: symmetric(w, 8 if "mlp" in n else 4), "int4-rtn-g32-sym"),
    "some-dense": (
        lambda n, w: Dense(w.clone()) if "mlp" in n else symmetric(w),
        "int4-rtn-g32-sym",
    ),
    "w8a8": (lambda _, w: int8(w), "w8a8"),
    "fp8": (lambda _, w: float8(w), "fp8"),
    "int4-asymmetric": (lambda _, w: asymmetric(w), "int4-rtn-g32"),
    "int4-asymmetric-channel": (lambda _, w: asymmetric(w, group=96), "int4-rtn-gch"),
    "int3-asymmetric": (lambda _, w: asymmetric(w, bits=3), "int3-rtn-g32"),
    "nested": (lambda _, w: nested(w), "int8-rtn-g32"),
}
# With these the library's own loader does not expect the packed zero points its writer makes.
NEED_DEQUANTIZE = {"int4-asymmetric", "int4-asymmetric-channel", "int3-asymmetric", "nested"}
# Rounding inputs moves logits by so much of their range: 8 bits of whole numbers, or of floats.
INPUTS_TOO = {"w8a8": 0.01, "fp8": 0.05}


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_written_reads_back_the_same(kind: str, tmp_path: Path) -> None:
    make, level = FORMS[kind]
    model, parts = compressed(LLAMA, make)
    folder = write_compressed_tensors(tmp_path / "out", parts)
    back = open_packed(folder)
    assert isinstance(back, CompressedTensorsCheckpoint)
    assert back.level == level
    read = back.read()
    assert "quantization_config" not in read.config
    for name, form in parts.forms.items():
        if isinstance(form, Dense):
            assert name not in read.forms
        else:
            assert torch.equal(read.forms[name].dense(), form.dense()), name
            assert type(read.forms[name]) in (type(form), Grouped)
    ids = torch.randint(128, (2, 9))
    assert torch.equal(filled(read, LLAMA)(ids).logits, model(ids).logits)


@needs_library
@pytest.mark.parametrize("kind", FORMS)
def test_transformers_loads_what_we_write(kind: str, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    model, parts = compressed(LLAMA, FORMS[kind][0])
    folder = write_compressed_tensors(tmp_path / "out", parts)
    ids = torch.randint(128, (2, 9))
    expected = model(ids).logits
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if kind not in NEED_DEQUANTIZE:
        logits = AutoModelForCausalLM.from_pretrained(folder, **options)(ids).logits
        close = 1e-5 + INPUTS_TOO.get(kind, 0.0) * float(expected.abs().max())
        assert torch.allclose(logits, expected, atol=close)
    if kind != "mixed":  # transformers takes the first group's settings for every layer then
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        logits = AutoModelForCausalLM.from_pretrained(folder, **options)(ids).logits
        # Its weights are in the type of the scales, float16 here, before they become float32.
        assert torch.allclose(logits, expected, atol=2e-3)


def library_folder(folder: Path, scheme: dict[str, Any], layout: str) -> nn.Module:
    """A random model quantized and packed by the library itself; returns its dense reference."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = QuantizationScheme(targets=["Linear"], **scheme)
    args = settings.weights
    assert args is not None
    packer = BaseCompressor.get_value_from_registry(layout)
    model = AutoModelForCausalLM.from_config(LLAMA).eval().requires_grad_(False)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor.contiguous()
            continue
        columns = args.group_size if args.strategy == "group" else tensor.shape[1]
        grouped = tensor.reshape(tensor.shape[0], -1, columns)
        low, high = grouped.amin(-1), grouped.amax(-1)
        if args.strategy == "tensor":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        scale, zero = calculate_qparams(low, high, args)
        module = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero}
        packed = packer.compress(module, settings)
        dense = packer.decompress(dict(packed), settings)["weight"]
        tensor.copy_(dense)
        head = name.removesuffix("weight")
        tensors |= {head + part: value.contiguous() for part, value in packed.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(LLAMA.to_json_string(use_diff=False))
    config["quantization_config"] = QuantizationConfig(
        config_groups={"group_0": settings},
        format=layout,
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))
    reference: nn.Module = model
    return reference


def weights(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": strategy, "symmetric": True, **more}


TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
LIBRARY = [
    pytest.param(
        {"weights": weights(4, "group", group_size=32)}, "pack-quantized", Grouped, id="w4a16"
    ),
    pytest.param(
        {"weights": weights(4, "group", group_size=16, symmetric=False)},
        "pack-quantized", Grouped, id="w4a16-asymmetric",
    ),
    pytest.param(
        {"weights": weights(3, "channel", symmetric=False)},
        "pack-quantized", Grouped, id="w3-channel",
    ),
    pytest.param({"weights": weights(8, "channel")}, "pack-quantized", Grouped, id="w8a16"),
    pytest.param({"weights": weights(8, "channel")}, "naive-quantized", Grouped, id="w8-naive"),
    pytest.param(
        {"weights": weights(4, "group", group_size=32, symmetric=False)},
        "naive-quantized", Grouped, id="w4-naive",
    ),
    pytest.param(
        {"weights": weights(8, "channel"), "input_activations": TOKENS},
        "int-quantized", Int8, id="w8a8",
    ),
    pytest.param(
        {
            "weights": weights(8, "tensor", type="float"),
            "input_activations": {**TOKENS, "type": "float"},
        },
        "float-quantized", Float8, id="fp8-tensor",
    ),
    pytest.param(
        {
            "weights": weights(8, "channel", type="float"),
            "input_activations": {**TOKENS, "type": "float"},
        },
        "float-quantized", Float8, id="fp8-channel",
    ),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize(("scheme", "layout", "kind"), LIBRARY)
def test_what_the_library_writes_is_read(
    scheme: dict[str, Any], layout: str, kind: type[LinearForm], tmp_path: Path
) -> None:
    reference = library_folder(tmp_path / "out", scheme, layout)
    packed = open_packed(tmp_path / "out")
    assert packed is not None
    read = packed.read()
    assert {type(form) for form in read.forms.values()} == {kind}
    ids = torch.randint(128, (2, 9))
    expected = reference(ids).logits
    assert torch.allclose(filled(read, LLAMA)(ids).logits, expected, atol=1e-5)


def test_columns_out_of_order_are_read_from_old_files(tmp_path: Path) -> None:
    _, parts = compressed(LLAMA, lambda _, w: symmetric(w))
    folder = write_compressed_tensors(tmp_path / "out", parts)
    shuffled = (torch.arange(64) // 32)[torch.randperm(64)].to(torch.int32)
    edit_tensors(folder, lambda t: t.update({f"{UP}.weight_g_idx": shuffled}))
    form = CompressedTensorsCheckpoint(folder).linear(UP)
    old = parts.forms[UP]
    assert isinstance(form, Grouped)
    assert isinstance(old, Grouped)
    moved = old.scales[:, shuffled.long()] * (old.codes.float() - 8)
    assert torch.equal(form.dense(), moved)


def ragged(_: str, weight: Tensor) -> LinearForm:
    return symmetric(weight, group=40)


REFUSED: dict[str, tuple[Make, str]] = {
    "low-rank": (lambda _, w: LowRank(Dense(w[:, :4]), Dense(w[:4])), "two factors"),
    "scaled": (lambda _, w: Scaled(symmetric(w), torch.ones(w.shape[1])), "inputs are scaled"),
    "smoothed": (
        lambda _, w: Int8(int8(w).codes, int8(w).scales, torch.ones(w.shape[1])),
        "scaled per column",
    ),
    "ordered": (
        lambda _, w: Grouped(
            symmetric(w).codes, symmetric(w).scales, symmetric(w).zeros, 4, 32,
            (torch.arange(w.shape[1]) // 32).flip(0).int(),
        ),
        "activation order",
    ),
    "fractional": (
        lambda _, w: Grouped(
            symmetric(w).codes, symmetric(w).scales, symmetric(w).zeros + 0.5, 4, 32
        ),
        "fractional",
    ),
    "ragged": (ragged, "do not divide"),
    "five-bits": (lambda _, w: symmetric(w, bits=5), "5 bits"),
    "dense": (lambda _, w: Dense(w), "nothing to write"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(
    kind: str, tmp_path: Path
) -> None:
    make, message = REFUSED[kind]
    _, parts = compressed(LLAMA, make)
    with pytest.raises(FormatError, match=message) as refused:
        write_compressed_tensors(tmp_path / "out", parts)
    assert kind == "dense" or "model.layers.0" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_conv1d_is_sent_to_the_other_format(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2)
    _, parts = compressed(config, lambda _, w: symmetric(w))
    with pytest.raises(FormatError, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D.*gptq"):
        write_compressed_tensors(tmp_path / "out", parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _, parts = compressed(LLAMA, lambda _, w: asymmetric(w))
    return write_compressed_tensors(tmp_path / "good", parts)


def group_change(**change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update(change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            lambda c: c["quantization_config"].update(quant_method="bitsandbytes"),
            "'bitsandbytes' cannot be read; known: gptq, awq, compressed-tensors", id="method",
        ),
        pytest.param(
            lambda c: c.update(quantization_config="int4"), "None cannot be read", id="no-object"
        ),
        pytest.param(
            lambda c: c["quantization_config"].update(format="nvfp4-pack-quantized"),
            "format 'nvfp4-pack-quantized' cannot be read; known: pack-quantized", id="nvfp4",
        ),
        pytest.param(
            lambda c: c["quantization_config"].update(sparsity_config={"format": "sparse-bitmask"}),
            "sparsity format 'sparse-bitmask'", id="sparse",
        ),
        pytest.param(
            lambda c: c["quantization_config"].update(config_groups={}), "config_groups", id="none"
        ),
        pytest.param(group_change(weights=None), "no settings of weights", id="no-weights"),
        pytest.param(
            group_change(weights={"num_bits": 4, "strategy": "block"}), "'block'", id="block"
        ),
        pytest.param(
            group_change(weights={"num_bits": 16, "strategy": "channel"}), "16 bits", id="bits"
        ),
        pytest.param(
            group_change(weights={"num_bits": True, "strategy": "channel"}), "True bits", id="bool"
        ),
        pytest.param(
            group_change(weights={"num_bits": 4, "strategy": "group", "group_size": -3}),
            "group_size is -3", id="group",
        ),
        pytest.param(
            group_change(input_activations={"num_bits": 4, "type": "int"}), "inputs", id="inputs"
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read_say_what_can(
    folder: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(folder, edit)
    with pytest.raises(FormatError, match=message):
        open_packed(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda t: t.pop(f"{UP}.weight_zero_point"), f"{UP}: .* fit 0", id="no-zeros"),
        pytest.param(
            lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, 1:].clone()}),
            f"{UP}: .* fit 0", id="short",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].float()}),
            f"{UP}: weight_packed is torch.float32", id="dtype",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"] * float("inf")}),
            f"{UP}: scales are not finite", id="infinite",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.weight_shape": torch.tensor([3, 3])}),
            rf"{UP}: weight_shape is \[3, 3\]", id="shape",
        ),
        pytest.param(
            lambda t: t.update({f"{UP}.weight_g_idx": torch.full((64,), 7, dtype=torch.int32)}),
            f"{UP}: weight_g_idx", id="order",
        ),
        pytest.param(
            lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: missing", id="no-norm"
        ),
        pytest.param(
            lambda t: t.update({"odd.weight_scale": torch.ones(1)}), "no linear of that name",
            id="stranger",
        ),
    ],
)  # fmt: skip
def test_malformed_tensors_are_named(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(CompressionError, match=message):
        CompressedTensorsCheckpoint(folder).read()


def test_a_dense_folder_is_no_packed_one(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    assert open_packed(tmp_path) is None
    assert len(load_file(tmp_path / "model.safetensors")) > 10
