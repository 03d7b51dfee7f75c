"""Our GPTQ beside gptqmodel's own solver on the same layers and inputs, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from compressors.quantize import gptq
from compressors.quantize.gptq import Settings
from tests.compressors.layers import draw, statistic

pytestmark = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel")


def peer_error(weight: Tensor, x: Tensor, bits: int, symmetric: bool, act_order: bool) -> float:
    """Output error of gptqmodel's result in groups of 32."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    config = QuantizeConfig(
        bits=bits,
        group_size=32,
        sym=symmetric,
        desc_act=act_order,
        act_group_aware=False,
        damp_percent=0.01,
    )
    solver = GPTQ(linear, config)
    solver.quantizer.configure(perchannel=True)
    for part in torch.split(x, 64):
        solver.add_batch(part[None], linear(part)[None])
    return error_of(weight, solver.quantize()[0].float(), x)


def error_of(weight: Tensor, computed: Tensor, x: Tensor) -> float:
    return float(((weight - computed) @ x.t()).square().sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_activation_order_without_search_is_what_gptqmodel_does(bits: int) -> None:
    for seed in range(4):
        weight, x = draw(seed, n=32, k=128, tokens=512)
        how = Settings(search=False)
        form = gptq.solve(weight, statistic(x), bits=bits, group=32, act_order=True, settings=how)
        theirs = peer_error(weight, x, bits, symmetric=False, act_order=True)
        assert error_of(weight, form.dense(), x) == pytest.approx(theirs, rel=0.12)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_never_behind_gptqmodel(bits: int, symmetric: bool, act_order: bool) -> None:
    for seed in range(3):
        weight, x = draw(seed, n=32, k=128, tokens=512)
        form = gptq.solve(
            weight, statistic(x), bits=bits, group=32, symmetric=symmetric, act_order=act_order
        )
        theirs = peer_error(weight, x, bits, symmetric, act_order)
        assert error_of(weight, form.dense(), x) < theirs
