"""Every weight-only quantizer through the whole pipeline, on odd widths, twice the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.forms.rotated import Rotated
from compressors.memory import MemorySink, materialize
from compressors.pipeline import compress
from compressors.recipe import Recipe
from compressors.tensor import Grouped, LinearForm
from gateway.engine.kernels.store import pack, unpack


def build(folder: Path, level: str) -> dict[str, LinearForm]:
    tokens = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))
    sink = MemorySink()
    recipe = Recipe.parse(level)
    compress(Checkpoint(folder), recipe, sink=sink, calibration=Calibration(tokens, "random"))
    assert torch.isfinite(materialize(sink)(tokens).logits).all()
    return sink.linears


@pytest.mark.parametrize(
    "level",
    [
        "int3-rtn-g16-sym",
        "int4-hqq-g16-sym",
        "int4-gptq-g16-act",
        "int3-gptq-g24-sym-act",
        "int4-awq-g16",
        "int2-rot-g24",
        "lowrank-60+int4-awq-g16",
        "lowrank-60+int4-gptq-g16-act",
        "sparse24-wanda+int4-gptq-g8-act",
    ],
)
def test_a_level_is_built_stored_and_the_same_every_time(
    level: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint("llama")
    first, second = build(folder, level), build(folder, level)
    assert first
    for module, form in first.items():
        assert torch.equal(form.dense(), second[module].dense())
        exact = form.dense()
        back = unpack(pack(form)).dense()
        torch.testing.assert_close(back, exact, rtol=4e-3, atol=4e-3 * float(exact.abs().max()))


def test_activation_order_and_rotation_are_in_the_forms(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint("llama")
    ordered = build(folder, "int4-gptq-g16-act").values()
    assert all(isinstance(form, Grouped) and form.perm is not None for form in ordered)
    assert all(isinstance(form, Rotated) for form in build(folder, "int2-rot-g16").values())
