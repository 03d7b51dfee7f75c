"""The methods on a real, trained network: each must beat its plain kin clearly."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

import gateway
from compressors.calibration import default_calibration, default_evaluation
from compressors.checkpoint import Checkpoint
from compressors.forms.nested import Nested
from compressors.lowrank import svd
from compressors.memory import MemorySink, materialize
from compressors.model import set_tensor
from compressors.pipeline import compress
from compressors.recipe import Recipe

FOLDER = Path(gateway.__file__).parent / "builtin" / "docs-17m"
Ratio = Callable[[str], float]


@pytest.fixture(scope="module")
def ratio() -> Ratio:
    """`ratio(level)`: perplexity of a level divided by that of the dense model, held-out text."""
    checkpoint = Checkpoint(FOLDER)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def tokenize(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    calibration = default_calibration(checkpoint, tokenize, windows=16, length=256)
    tokens = default_evaluation(checkpoint, tokenize, windows=12, length=256).tokens

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    @cache
    def built(parent: str) -> MemorySink:
        sink = MemorySink()
        compress(checkpoint, Recipe.parse(parent), sink=sink, calibration=calibration)
        return sink

    def build(level: str) -> torch.nn.Module:
        recipe = Recipe.parse(level)
        sink = copy(built(recipe.parent.name))
        if recipe.child:
            nested = {n: f for n, f in sink.linears.items() if isinstance(f, Nested)}
            assert nested.keys() == sink.linears.keys()
            sink.linears = {name: form.child for name, form in nested.items()}
        return materialize(sink)

    dense = loss(build("fp32"))

    @cache
    def measure(level: str) -> float:
        if level == "plain SVD at 80 %":
            model = build("fp32")
            for name, module in list(model.named_modules()):
                if isinstance(module, torch.nn.Linear) and "layers" in name:
                    u, s, vt = torch.linalg.svd(module.weight, full_matrices=False)
                    rank = svd.rank_of(*module.weight.shape, 80)
                    set_tensor(module, "weight", (u[:, :rank] * s[:rank]) @ vt[:rank])
        else:
            model = build(level)
        return float(torch.tensor(loss(model) - dense).exp())

    return measure


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "plain", "share"),
    [
        ("int4-hqq-g128", "int4-rtn-g128", 0.95),
        ("int4-gptq-g128", "int4-rtn-g128", 0.7),
        ("int3-gptq-g128", "int3-rtn-g128", 0.6),
        ("int3-awq-g128", "int3-rtn-g128", 0.75),
        ("int3-gptq-g128", "int3-awq-g128", 0.9),
        ("sparse24-wanda", "sparse24-magnitude", 0.93),
        ("sparse24-sparsegpt", "sparse24-wanda", 0.8),
        ("lowrank-80", "plain SVD at 80 %", 0.25),
    ],
)
def test_a_method_loses_clearly_less_than_its_plain_kin(
    level: str, plain: str, share: float, ratio: Ratio
) -> None:
    """`share` bounds the loss in nats relative to the plain method's."""
    good, bad = torch.tensor([ratio(level), ratio(plain)]).log().tolist()
    assert 0 < good < share * bad


@pytest.mark.slow
def test_two_nested_levels_are_as_good_as_levels_of_their_own(ratio: Ratio) -> None:
    assert ratio("nested84-gptq-g128@int4") < 1.01 * ratio("int4-gptq-g128")
    assert ratio("nested84-gptq-g128@int8") < 1.005 * ratio("int8")


@pytest.mark.slow
@pytest.mark.parametrize(("level", "most"), [("int8", 1.005), ("depth-88", 1.6), ("width-90", 1.4)])
def test_a_mild_level_loses_little(level: str, most: float, ratio: Ratio) -> None:
    assert ratio(level) < most
