"""Whole jobs on tiny random checkpoints: every architecture, every method, stacks, odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressors import gram, pipeline
from compressors.base import CompressionError
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.memory import MemorySink, materialize
from compressors.model import decoder_blocks, linears, weight_of
from compressors.pipeline import compress
from compressors.plan import Plan, make_plan
from compressors.quantize import gptq
from compressors.recipe import Recipe
from compressors.tensor import Dense, Grouped, LinearForm, LowRank, Sparse24
from tests.compressors.conftest import CONFIGS
from tests.compressors.test_checkpoint import fill

MakeCheckpoint = Callable[..., Path]
METHODS = [
    "fp32",
    "bf16",
    "int8",
    "int4-rtn-g64",
    "int4-hqq-g16",
    "int4-gptq-g16",
    "sparse24-magnitude",
    "sparse24-wanda",
    "lowrank-80",
    "depth-50",
]
STACKS = [
    "depth-75+int4-rtn-g16",
    "depth-50+lowrank-80+int8",
    "lowrank-80+int4-gptq-g16",
    "sparse24-wanda+int8",
    "sparse24-magnitude+int4-hqq-g8",
    "sparse24-wanda+int4-gptq-g16",
]
CALIBRATION = Calibration(
    torch.randint(97, (6, 24), generator=torch.Generator().manual_seed(0)), "random tokens"
)


def run(folder: Path, level: str, **options: Any) -> tuple[MemorySink, Any]:
    sink = MemorySink()
    options = {"calibration": CALIBRATION, **options}
    report = compress(Checkpoint(folder), Recipe.parse(level), sink=sink, **options)
    return sink, report


def logits(model: nn.Module, tokens: Tensor = CALIBRATION.tokens) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("level", METHODS)
def test_every_method_on_every_architecture(
    arch: str, level: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint(arch)
    sink, report = run(folder, level)
    checkpoint = Checkpoint(folder)
    dense = fill(checkpoint)
    model = materialize(sink)
    found, expected = logits(model), logits(dense)
    assert torch.isfinite(found).all()
    if level == "fp32":
        assert torch.equal(found, expected)
    if level in ("bf16", "int8"):
        assert (found - expected).norm() < 0.2 * expected.norm()
    blocks = decoder_blocks(dense)
    per_block = len(list(linears(blocks.modules[0])))
    kept = len(blocks) // 2 if level == "depth-50" else len(blocks)
    assert len(decoder_blocks(model)) == kept
    compressed = 0 if level in ("fp32", "bf16", "depth-50") else per_block * len(blocks)
    whole = len(report.skipped) if level == "lowrank-80" else 0  # those that need all their ranks
    assert len(report.layers) == len(sink.linears) == compressed - whole
    assert all(0 <= layer.relative_error < 1 for layer in report.layers)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("level", STACKS)
def test_stacks(arch: str, level: str, make_checkpoint: MakeCheckpoint) -> None:
    sink, report = run(make_checkpoint(arch), level)
    assert torch.isfinite(logits(materialize(sink))).all()
    assert report.recipe == level
    for form in sink.linears.values():
        if "lowrank" in level:
            parts = (form.left, form.right) if isinstance(form, LowRank) else (form,)
            assert all(isinstance(part, Grouped) for part in parts)
        elif "sparse24" in level:
            assert isinstance(form, Sparse24)
            assert isinstance(form.values, Grouped)
            assert ((form.dense() != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
        else:
            assert isinstance(form, Grouped)


@pytest.mark.parametrize("level", [*METHODS[2:], *STACKS])
def test_what_is_not_compressed_keeps_its_bytes(
    level: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint("qwen2", torch.bfloat16)
    checkpoint = Checkpoint(folder)
    sink, _ = run(folder, level)
    stored = {bytes(checkpoint.tensor(n).view(torch.uint8).numpy()) for n in checkpoint.names}
    assert "lm_head.weight" not in sink.tensors  # tied: the embedding stands for it
    for name, tensor in sink.tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert bytes(tensor.contiguous().view(torch.uint8).numpy()) in stored, name
    for form in sink.linears.values():
        values = form.values if isinstance(form, Sparse24) else form
        if isinstance(values, Dense):
            assert values.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", ["int4-gptq-g16", "lowrank-80", "sparse24-wanda", "depth-50"])
def test_half_precision_checkpoints(
    level: str, dtype: torch.dtype, make_checkpoint: MakeCheckpoint
) -> None:
    sink, _ = run(make_checkpoint("opt", dtype), level)
    assert torch.isfinite(logits(materialize(sink))).all()


def test_a_dense_level_casts_and_says_so(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama", torch.bfloat16)
    for level, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        sink, _ = run(folder, level)
        assert {t.dtype for t in sink.tensors.values()} == {dtype}
        assert sink.model_config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("level", ["int4-hqq-g16", "int4-gptq-g16", "lowrank-80+int8", "depth-50"])
def test_equal_jobs_give_equal_bytes(level: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    (first, one), (second, two) = run(folder, level, seed=3), run(folder, level, seed=3)
    assert first.model_config == second.model_config
    assert first.tensors.keys() == second.tensors.keys()
    for name, form in first.linears.items():
        assert torch.equal(form.dense(), second.linears[name].dense()), name
    assert [x.relative_error for x in one.layers] == [x.relative_error for x in two.layers]


@pytest.mark.parametrize("level", [*METHODS[2:-1], *STACKS])
def test_odd_sizes_never_fail(level: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama", hidden_size=36, intermediate_size=43, head_dim=6)
    sink, report = run(folder, level)
    assert torch.isfinite(logits(materialize(sink))).all()
    notes = {layer.note for layer in report.layers}
    if "gptq-g16" in level and "+" not in level:
        assert "last group has 4 columns" in notes  # 36 columns
        assert "last group has 11 columns" in notes  # 43 columns
    down = [module for module in sink.linears if module.endswith("down_proj")]
    if level in ("sparse24-magnitude", "sparse24-wanda"):
        assert not down  # 43 columns cannot be 2:4
        assert f"{next(iter(decoder_paths(sink)))}.mlp.down_proj.weight" in sink.tensors


def decoder_paths(sink: MemorySink) -> set[str]:
    return {module.rsplit(".", 2)[0] for module in sink.linears}


def test_skipped_layers_are_told_with_the_reason(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama", intermediate_size=43)
    _, report = run(folder, "sparse24-magnitude")
    assert "no multiple of 4" in report.skipped["model.layers.0.mlp.down_proj"]


def test_calibration_sees_already_compressed_inputs(make_checkpoint: MakeCheckpoint) -> None:
    """Rebuilt from scratch: the statistic of a late layer is that of the compressed model."""
    folder = make_checkpoint("llama")
    sink, _ = run(folder, "int4-gptq-g16")
    late = "model.layers.3.mlp.down_proj"
    model = materialize(sink)
    statistic = gram.empty(56)
    model.get_submodule(late).register_forward_pre_hook(
        lambda _m, args: gram.accumulate(statistic, args[0])
    )
    logits(model)
    checkpoint = Checkpoint(folder)
    weight = checkpoint.tensor(f"{late}.weight")
    expected = gptq.solve(weight, statistic, bits=4, group=16)
    found = sink.linears[late]
    assert isinstance(found, Grouped)
    assert (found.codes == expected.codes).float().mean() > 0.98
    dense_statistic = gram.empty(56)
    dense = fill(checkpoint)
    dense.get_submodule(late).register_forward_pre_hook(
        lambda _m, args: gram.accumulate(dense_statistic, args[0])
    )
    logits(dense)
    naive = gptq.solve(weight, dense_statistic, bits=4, group=16)
    assert (found.codes == naive.codes).float().mean() < 0.98


def test_calibrated_methods_lose_less_output_than_their_plain_kin(
    make_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_checkpoint("llama")
    expected = logits(fill(Checkpoint(folder)))

    def loss(level: str) -> float:
        return float((logits(materialize(run(folder, level)[0])) - expected).norm())

    assert loss("int4-gptq-g16") < loss("int4-rtn-g16")
    assert loss("sparse24-wanda+int4-gptq-g16") < loss("sparse24-wanda")


def test_depth_renumbers_blocks_and_their_config(make_checkpoint: MakeCheckpoint) -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = make_checkpoint("gemma3_text", layer_types=types)
    sink, report = run(folder, "depth-50")
    dropped = {int(name.rsplit(".", 1)[1]) for name in report.skipped}
    kept = [i for i in range(4) if i not in dropped]
    assert len(kept) == 2
    assert sink.model_config["num_hidden_layers"] == 2
    assert sink.model_config["layer_types"] == [types[i] for i in kept]
    checkpoint = Checkpoint(folder)
    for new, old in enumerate(kept):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(sink.tensors[name.format(new)], checkpoint.tensor(name.format(old)))


def test_depth_drops_the_block_that_does_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    sink, report = run(tmp_path, "depth-75")
    assert set(report.skipped) == {"model.layers.2"}
    torch.testing.assert_close(logits(materialize(sink)), logits(fill(Checkpoint(tmp_path))))


@pytest.mark.parametrize(
    ("level", "options", "says"),
    [
        ("int4-gptq-g16", {"calibration": None}, "needs calibration"),
        ("depth-95", {}, "95 % of 4 blocks"),
        (
            "sparse24-wanda",
            {"calibration": Calibration(torch.full((2, 8), 97), "x")},
            "outside the model's vocabulary",
        ),
    ],
)
def test_an_impossible_job_fails_before_anything_is_written(
    level: str, options: dict[str, Any], says: str, make_checkpoint: MakeCheckpoint
) -> None:
    sink = MemorySink()
    options = {"calibration": CALIBRATION, **options}
    with pytest.raises(CompressionError, match=says):
        compress(Checkpoint(make_checkpoint("llama")), Recipe.parse(level), sink=sink, **options)
    assert not sink.tensors
    assert not sink.linears
    assert not sink.model_config


def test_a_broken_weight_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for level in ("int8", "int4-gptq-g16"):
        with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp"):
            run(tmp_path, level)


def test_an_already_quantized_model_is_refused(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = Checkpoint(make_checkpoint("llama"))
    checkpoint.config = {**checkpoint.config, "quantization_config": {"bits": 4}}
    with pytest.raises(CompressionError, match="quantized already"):
        compress(checkpoint, Recipe.parse("int8"), sink=MemorySink())


def test_progress_rises_to_one_and_can_cancel(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    for level in ("int8", "depth-75+int4-gptq-g16"):
        shares: list[float] = []
        run(folder, level, progress=lambda share, _what, shares=shares: shares.append(share))
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0)

    class Cancelled(Exception):
        pass

    def cancel(share: float, _what: str) -> None:
        if share > 0.4:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(folder, "int4-gptq-g16", progress=cancel)


@pytest.mark.parametrize("level", ["int4-gptq-g16", "int4-rtn-g16", "depth-50+lowrank-80"])
def test_only_one_block_of_weights_is_held(
    level: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever something is written, at most one block of the model has weights."""
    plans: list[Plan] = []
    monkeypatch.setattr(
        pipeline, "make_plan", lambda *args: plans.append(make_plan(*args)) or plans[-1]
    )
    held: list[int] = []

    class Watching(MemorySink):
        def linear(self, module: str, form: LinearForm) -> None:
            super().linear(module, form)
            blocks = plans[-1].source.blocks.modules
            held.append(sum(any(not p.is_meta for p in b.parameters()) for b in blocks))

    compress(
        Checkpoint(make_checkpoint("llama")),
        Recipe.parse(level),
        sink=Watching(),
        calibration=CALIBRATION,
    )
    assert max(held) == (0 if "rtn" in level else 1)


def test_report_is_json_and_a_table(make_checkpoint: MakeCheckpoint) -> None:
    import json

    from rich.console import Console

    from compressors.report import to_table

    _, report = run(make_checkpoint("gpt2"), "depth-75+int4-rtn-g16")
    assert json.loads(json.dumps(report.to_json()))["recipe"] == report.recipe
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(to_table(report.to_json()))
    text = console.export_text()
    for word in ("attn.c_attn", "mlp.c_proj", "dropped", "grouped"):
        assert word in text


def test_conv1d_weights_are_presented_as_n_by_k(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("gpt2")
    sink, _ = run(folder, "int8")
    form = sink.linears["transformer.h.0.attn.c_attn"]
    assert form.shape == (96, 32)
    stored = Checkpoint(folder).tensor("transformer.h.0.attn.c_attn.weight")
    torch.testing.assert_close(form.dense(), stored.t(), atol=0.02, rtol=0)
    module = dict(linears(materialize(sink)))["transformer.h.0.attn.c_attn"]
    assert weight_of(module).shape == (96, 32)
