"""Width pruning: the criterion against naive float64, structure on every architecture, stacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressors.base import CompressionError
from compressors.checkpoint import Checkpoint
from compressors.memory import materialize
from compressors.model import decoder_blocks
from compressors.prune import width
from compressors.recipe import Recipe, RecipeError
from gateway.engine.kernels.store import pack
from gateway.engine.runner import VariantWeights, build_model, forward_logits
from tests.compressors.conftest import CONFIGS
from tests.compressors.layers import draw
from tests.compressors.test_checkpoint import fill
from tests.compressors.test_pipeline import CALIBRATION, logits, run

MakeCheckpoint = Callable[..., Path]
SAYS_FEWER_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}


def moments(x: Tensor) -> width.Moments:
    statistic = width.empty(x.shape[1])
    for part in x.split(64):
        width.accumulate(statistic, part)
    return statistic


def least_squares(weight: Tensor, x: Tensor, columns: list[int], biased: bool) -> Tensor:
    """Squared loss of the best weight (and bias) on some columns, float64, by lstsq."""
    inputs = x.double()[:, columns]
    if biased:
        inputs = torch.cat([inputs, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    target = x.double() @ weight.double().t()
    found = torch.linalg.lstsq(inputs, target).solution
    return (inputs @ found - target).square().sum()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("unit", [1, 5])
def test_the_consumer_is_fitted_as_well_as_can_be(unit: int, biased: bool) -> None:
    weight, x = draw(1, tokens=400)
    x = x + 0.5
    cut = width.solve(weight, moments(x), unit=unit, kept=20 // unit, biased=biased)
    columns = width.columns_of(cut.units, unit)
    assert cut.weight.shape == (24, 20)
    assert (cut.units.diff() > 0).all()
    assert (cut.shift is not None) == biased
    out = x[:, columns] @ cut.weight.t() + (0 if cut.shift is None else cut.shift)
    loss = (out - x @ weight.t()).double().square().sum()
    best = least_squares(weight, x, columns.tolist(), biased)
    assert float(best) <= float(loss) <= 1.01 * float(best)


@pytest.mark.parametrize("unit", [1, 4])
def test_the_cost_of_a_unit_is_what_leaving_it_out_loses(unit: int) -> None:
    weight, x = draw(2, tokens=400)
    inverse = torch.linalg.inv(x.double().t() @ x.double())
    cost = width.removal_cost(weight.double(), inverse, unit)
    for u in range(40 // unit):
        left = [k for k in range(40) if k // unit != u]
        expected = float(least_squares(weight, x, left, False))
        assert float(cost[u]) == pytest.approx(expected, rel=1e-6)


def test_the_cheapest_goes_first_and_the_rest_is_judged_anew() -> None:
    """Against naive greedy removal, one unit at a time."""
    weight, x = draw(4, tokens=400)
    left = list(range(10))

    def loss(units: list[int]) -> float:
        columns = [4 * u + i for u in units for i in range(4)]
        return float(least_squares(weight, x, columns, False))

    while len(left) > 5:
        left = min(([u for u in left if u != out] for out in left), key=loss)
    assert width.solve(weight, moments(x), unit=4, kept=5, biased=False).units.tolist() == left


def test_of_two_units_that_say_the_same_one_stays() -> None:
    weight, x = draw(5, tokens=400)
    x[:, 7] = x[:, 3]
    weight[:, [3, 7]] *= 3
    weight[:, 11] = 0  # nobody reads it
    cut = width.solve(weight, moments(x), unit=1, kept=38, biased=False)
    kept = set(cut.units.tolist())
    assert 11 not in kept
    assert len(kept & {3, 7}) == 1
    out = x[:, cut.units] @ cut.weight.t()
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-2, atol=1e-2)


def test_a_channel_that_is_never_used_is_free() -> None:
    weight, x = draw(6, tokens=400)
    x[:, 9] = 0
    weight[:, 9] = 10
    assert 9 not in width.solve(weight, moments(x), unit=1, kept=39, biased=False).units
    nothing = width.solve(weight, moments(torch.zeros_like(x)), unit=1, kept=3, biased=True)
    assert torch.isfinite(nothing.weight).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, x = draw(7)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        width.solve(weight, moments(x), unit=1, kept=3, biased=False)


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_architecture_shrinks_as_far_as_its_config_can_say(
    arch: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint(arch)
    sink, report = run(folder, "width-50")
    model = materialize(sink)
    assert ("heads" in report.skipped) == (arch not in SAYS_FEWER_HEADS)
    small, large = (
        sum(p.numel() for p in decoder_blocks(m).modules.parameters())
        for m in (model, fill(Checkpoint(folder)))
    )
    assert small < (0.55 if arch in SAYS_FEWER_HEADS else 0.8) * large
    # Plain transformers loads it from a folder, and computes the same.
    save_file(
        {name: tensor.contiguous() for name, tensor in sink.tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(sink.model_config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_fitting_keeps_more_than_mere_cutting(arch: str, make_checkpoint: MakeCheckpoint) -> None:
    """On the text it was fitted to, against the same units with the weights they had."""
    folder = make_checkpoint(arch)
    dense = fill(Checkpoint(folder))
    expected = logits(dense)
    fitted, _ = run(folder, "width-75")
    solve = width.solve

    def plain(weight: Tensor, statistic: width.Moments, **options: int) -> width.Cut:
        cut = solve(weight, statistic, **options)  # type: ignore[arg-type]
        columns = width.columns_of(cut.units, options["unit"])
        shift = None if cut.shift is None else torch.zeros_like(cut.shift)
        return width.Cut(cut.units, weight[:, columns].contiguous(), shift)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(width, "solve", plain)
        cut, _ = run(folder, "width-75")
    error = float((logits(materialize(fitted)) - expected).norm())
    assert error < float((logits(materialize(cut)) - expected).norm())


@pytest.mark.parametrize(
    "level", ["width-75+int4-gptq-g16", "depth-75+width-50", "depth-50+width-75+sparse24-wanda"]
)
def test_stacks(level: str, make_checkpoint: MakeCheckpoint) -> None:
    sink, report = run(make_checkpoint("llama", torch.bfloat16), level)
    assert torch.isfinite(logits(materialize(sink))).all()
    assert report.recipe == level
    assert sink.model_config["num_hidden_layers"] == (
        {"depth-75": 3, "depth-50": 2}.get(level.partition("+")[0], 4)
    )
    assert sink.model_config["intermediate_size"] == (28 if "width-50" in level else 42)


def test_a_number_of_heads_that_the_config_refuses(make_checkpoint: MakeCheckpoint) -> None:
    """A Llama becomes its twin that takes any; Gemma 2 has none and gets the nearest it takes."""
    six = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}
    sink, _ = run(make_checkpoint("llama", **six), "width-83")
    assert sink.model_config["model_type"] == "mistral"
    assert sink.model_config["num_attention_heads"] == 5
    assert torch.isfinite(logits(materialize(sink))).all()
    plain, _ = run(make_checkpoint("llama", **six), "width-50")
    assert plain.model_config["model_type"] == "llama"
    assert plain.model_config["num_attention_heads"] == 3
    sink, _ = run(make_checkpoint("gemma2", **six), "width-78")
    assert sink.model_config["num_attention_heads"] == 4


def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    make_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_checkpoint("llama", intermediate_size=3, num_key_value_heads=1)
    with pytest.raises(CompressionError, match="width-95: nothing of this model can be cut"):
        run(folder, "width-95")
    with pytest.raises(RecipeError, match="width pruning"):
        Recipe.parse("int8+width-75")


@pytest.mark.parametrize("heads", [(6, 6), (9, 3), (7, 1)])
def test_the_engine_serves_any_number_of_heads(
    heads: tuple[int, int], make_checkpoint: MakeCheckpoint
) -> None:
    """Odd counts, after cutting one key-value group where there is one to cut."""
    queries, groups = heads
    folder = make_checkpoint(
        "mistral", num_attention_heads=queries, num_key_value_heads=groups, head_dim=8
    )
    sink, _ = run(folder, "width-80+int8")
    kept = {6: 5, 3: 2, 1: 1}[groups]
    assert sink.model_config["num_key_value_heads"] == kept
    assert sink.model_config["num_attention_heads"] == kept * queries // groups
    stored = {name: pack(form) for name, form in sink.linears.items()}
    weights = VariantWeights(sink.model_config, sink.tensors, stored, torch.float32)
    model = build_model(weights)
    assert {shape.kv_heads for shape in model.layout.layers} == {kept}
    expected = logits(materialize(sink))
    found = forward_logits(model, CALIBRATION.tokens)
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert float(cosine.mean()) > 0.99  # kernels may round activations to 8 bits
