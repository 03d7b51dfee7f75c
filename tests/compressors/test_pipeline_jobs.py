"""How a job runs: threads, cancelling, going on after a kill, experts, and what is forecast."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from compressors.base import Milestone
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.experts import Routed
from compressors.forecast import forecast, refusal
from compressors.memory import MemorySink, materialize
from compressors.model import linears
from compressors.parallel import Lanes
from compressors.pipeline import Host, compress
from compressors.plan import open_source, shapes_of
from compressors.quantize import rtn
from compressors.recipe import Recipe
from compressors.tensor import Grouped

MakeCheckpoint = Callable[..., Path]
CALIBRATION = Calibration(
    torch.randint(97, (6, 24), generator=torch.Generator().manual_seed(0)), "random tokens"
)
_MOE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen2_moe": {
        **_MOE,
        "num_experts": 5,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {**_MOE, "num_experts": 5, "moe_intermediate_size": 20, "head_dim": 8},
    "olmoe": {**_MOE, "num_experts": 5},
    "granitemoe": {**_MOE, "num_local_experts": 4},  # stores an experts layer as one tensor
    "gpt_oss": {**_MOE, "num_local_experts": 4, "head_dim": 8},  # transposed, interleaved, biases
}
FUSED: dict[str, dict[str, Any]] = {
    "phi3": {**_MOE, "pad_token_id": 0},
    "falcon": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            torch.manual_seed(1)
            config = CONFIG_MAPPING[arch](**{**EXPERTS, **FUSED}[arch])
            made[arch] = tmp_path_factory.mktemp(arch)
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "bias" in name:
                        parameter.uniform_(-0.1, 0.1)
            model.save_pretrained(made[arch])
        return made[arch]

    return make


def run(folder: Path, level: str, **options: Any) -> tuple[MemorySink, Any]:
    sink = MemorySink()
    options = {"calibration": CALIBRATION, **options}
    report = compress(Checkpoint(folder), Recipe.parse(level), sink=sink, **options)
    return sink, report


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(input_ids=CALIBRATION.tokens).logits.float()
    return out


def same(first: MemorySink, second: MemorySink) -> bool:
    return (
        first.tensors.keys() == second.tensors.keys()
        and first.linears.keys() == second.linears.keys()
        and all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())
        and all(
            torch.equal(form.dense(), second.linears[name].dense())
            for name, form in first.linears.items()
        )
    )


@pytest.mark.parametrize("level", ["int8", "int4-gptq-g16", "sparse24-wanda+int8", "depth-50"])
def test_threads_change_nothing(level: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    one, first = run(folder, level, host=Host(threads=1))
    three, second = run(folder, level, host=Host(threads=3))
    assert same(one, three)
    assert [x.module for x in first.layers] == [x.module for x in second.layers]
    assert [x.relative_error for x in first.layers] == [x.relative_error for x in second.layers]


def test_lanes_hold_little_and_stop_at_the_first_error() -> None:
    running, most, begun = 0, 0, []
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            begun.append(item)
        if item == 5:
            raise ValueError("five")
        with lock:
            running -= 1
        return item * item

    with Lanes(2) as lanes:
        got: list[int] = []
        with pytest.raises(ValueError, match="five"):
            got.extend(lanes.map(work, range(100)))
    assert got == [0, 1, 4, 9, 16]
    assert most <= 2
    assert len(begun) <= 8


class Notes:
    """A journal in memory that keeps every milestone."""

    def __init__(self, last: Milestone | None = None) -> None:
        self.last, self.kept = last, list[Milestone]()

    def load(self) -> Milestone | None:
        return self.last

    def save(self, milestone: Milestone) -> None:
        hidden = tuple(h.clone() for h in milestone.hidden)
        self.kept.append(Milestone(milestone.blocks, milestone.facts, hidden))


class Again(MemorySink):
    """Takes a piece twice if it is the same: a resumed job repeats a little."""

    def tensor(self, name: str, tensor: Tensor) -> None:
        assert torch.equal(self.tensors.pop(name, tensor), tensor)
        super().tensor(name, tensor)

    def linear(self, module: str, form: Any) -> None:
        self.linears.pop(module, None)
        super().linear(module, form)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", ["int8", "int4-gptq-g16", "depth-75+int4-gptq-g16"])
def test_a_job_cancelled_anywhere_goes_on_to_the_same_bytes(
    level: str, threads: int, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint("llama")
    whole, report = run(folder, level, host=Host(threads=threads))
    notes, sink = Notes(), Again()

    def stop(_share: float, what: str) -> None:
        if what == "model.layers.2.self_attn.q_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_into(sink, folder, level, Host(threads=threads, journal=notes), stop)
    assert [milestone.blocks for milestone in notes.kept] == [1, 2]
    assert "model.layers.3.mlp.down_proj" not in sink.linears
    shares: list[float] = []
    host = Host(threads=threads, journal=Notes(notes.kept[-1]))
    again = run_into(sink, folder, level, host, lambda share, _what: shares.append(share))
    assert same(sink, whole)
    assert [x.module for x in again.layers] == [x.module for x in report.layers]
    assert shares == sorted(shares)


def run_into(sink: MemorySink, folder: Path, level: str, host: Host, progress: Any) -> Any:
    return compress(
        Checkpoint(folder),
        Recipe.parse(level),
        sink=sink,
        calibration=CALIBRATION,
        progress=progress,
        host=host,
    )


@pytest.mark.parametrize("arch", [*EXPERTS, *FUSED])
@pytest.mark.parametrize("level", ["fp32", "int8", "int4-hqq-g16", "int4-gptq-g16"])
def test_experts_and_fused_projections(
    arch: str, level: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(arch)
    sink, report = run(folder, level)
    dense = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    model = materialize(sink)
    found = logits(model)
    error = float((found - dense).norm() / dense.norm())
    if level == "fp32":
        assert error < 1e-5
        return
    assert 0 < error < (0.1 if level == "int8" else 0.9)
    assert not report.skipped
    compressed = {name for name, _ in linears(model) if "lm_head" not in name}
    assert compressed <= set(sink.linears)
    if arch in EXPERTS:
        layers = [m for m in model.modules() if isinstance(m, Routed)]
        assert len(layers) == 2
        assert any(".experts.3." in name for name in sink.linears)


def test_an_expert_that_no_text_reaches_is_rounded_and_noted(
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("mixtral")
    tokens = Calibration(torch.full((1, 8), 3), "one token")
    sink, report = run(folder, "int4-gptq-g16", calibration=tokens)
    unreached = [x.module for x in report.layers if "never reached" in x.note]
    assert unreached
    assert all(".experts." in module for module in unreached)
    source = open_source(Checkpoint(folder))
    for module in unreached:
        weight = source.read(f"{module}.weight").float()
        form = sink.linears[module]
        assert isinstance(form, Grouped)
        scales, zeros = rtn.fitted_grid(weight, 4, 16, symmetric=False)
        assert torch.equal(form.codes, rtn.encode_groups(weight, scales, zeros, 4, 16))


def test_tokens_do_not_see_each_other_in_experts(checkpoint: Callable[[str], Path]) -> None:
    model = materialize(run(checkpoint("mixtral"), "fp32")[0])
    layer: Any = next(m for m in model.modules() if isinstance(m, Routed))
    x = torch.randn(9, 32)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    with torch.no_grad():
        whole = layer(x, index, weights)
        alone = [layer(x[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(whole, torch.cat(alone))


def test_the_forecast_grows_with_the_job(make_checkpoint: MakeCheckpoint) -> None:
    shapes = shapes_of(open_source(Checkpoint(make_checkpoint("llama"))).model, 4)
    assert shapes.weights == sum(n * k for block in shapes.blocks for n, k in block)
    assert len(shapes.blocks) == 4

    def of(level: str, **options: Any) -> tuple[int, float]:
        expected = forecast(shapes, Recipe.parse(level), **options)
        return expected.peak_bytes, expected.seconds

    assert of("int8")[1] < of("int4-hqq-g64")[1] < of("int4-gptq-g128")[1]
    assert of("int8")[0] < of("int4-gptq-g128")[0]
    assert of("int8", threads=4)[0] > of("int8")[0]
    assert of("int8", threads=4)[1] < of("int8")[1]
    assert of("int4-gptq-g128", tokens=2**20) > of("int4-gptq-g128")


def test_a_job_that_does_not_fit_is_refused_with_the_numbers(
    make_checkpoint: MakeCheckpoint,
) -> None:
    shapes = shapes_of(open_source(Checkpoint(make_checkpoint("llama"))).model, 4)
    recipe = Recipe.parse("int4-gptq-g128")
    expected = forecast(shapes, recipe)
    assert not refusal(recipe, expected, None)
    assert not refusal(recipe, expected, expected.peak_bytes)
    why = refusal(recipe, expected, expected.peak_bytes - 1)
    assert "int4-gptq-g128" in why
    assert f"{expected.peak_bytes / 1e9:.1f} GB" in why


def test_a_method_that_does_a_whole_model_computes_where_the_host_says(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []

    def solve(*_: object, device: object, **__: object) -> None:
        told.append(device)

    monkeypatch.setattr("compressors.quantize.autogptq.solve", solve)
    run(checkpoint("phi3"), "int4-autogptq-g32", host=Host(device="cuda:1"))
    assert told == ["cuda:1"]
