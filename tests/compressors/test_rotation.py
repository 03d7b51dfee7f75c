"""The rotation against its own definition in float64, and what it buys at few bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors.forms.rotated import Rotated, hadamard
from compressors.quantize import gptq, rotation, rtn
from compressors.tensor import Grouped
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.store import pack, unpack
from tests.compressors.layers import draw, output_error, statistic


def matrix_of(form: Rotated) -> Tensor:
    """R [K, K] from entries: (-1) to the number of common ones of row and column, over √block."""
    k = form.shape[1]
    out = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(i // form.block * form.block, (i // form.block + 1) * form.block):
            ones = ((i % form.block) & (j % form.block)).bit_count()
            out[i, j] = (-1) ** ones * int(form.signs[j]) / form.block**0.5
    return out


def outlying(seed: int, **sizes: int) -> tuple[Tensor, Tensor]:
    """A layer with a few large weights and a few large inputs."""
    weight, x = draw(seed, **sizes)
    weight[::5, ::9] *= 5
    return weight, x * (1 + 4 * (torch.arange(x.shape[1]) % 11 == 0))


def test_the_form_is_a_rotation_of_what_it_holds() -> None:
    weight, x = draw(31, n=24, k=48)
    form = rotation.solve(weight, statistic(x), bits=3, group=16)
    assert isinstance(form, Rotated)
    assert form.block == 16
    turn = matrix_of(form)
    torch.testing.assert_close(turn @ turn.t(), torch.eye(48, dtype=torch.float64))
    torch.testing.assert_close(form.dense(torch.float64), form.form.dense(torch.float64) @ turn)
    inside = gptq.solve(
        (weight.double() @ turn.t()).float(), statistic(x @ turn.t().float()), bits=3, group=16
    )
    assert isinstance(form.form, Grouped)
    assert (inside.codes == form.form.codes).float().mean() > 0.98


@pytest.mark.parametrize("size", [2, 8, 128])
def test_hadamard_is_symmetric_and_its_own_inverse(size: int) -> None:
    h = hadamard(size, torch.device("cpu"))
    assert torch.equal(h, h.t())
    torch.testing.assert_close(h @ h, torch.eye(size))
    torch.testing.assert_close(h.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize("bits", [2, 3])
def test_rotation_beats_plain_gptq_where_there_are_outliers(bits: int) -> None:
    ours, plain, nearest = 0.0, 0.0, 0.0
    for seed in range(50):
        weight, x = outlying(seed, n=16, k=64, tokens=300)
        g = statistic(x)
        error = output_error(weight, rotation.solve(weight, g, bits=bits, group=32), x)
        rounded = output_error(weight, rtn.solve(weight, bits=bits, group=32), x)
        assert error <= rounded
        ours, nearest = ours + error, nearest + rounded
        plain += output_error(weight, gptq.solve(weight, g, bits=bits, group=32), x)
    assert ours < 0.95 * plain < plain < nearest


@pytest.mark.parametrize(("columns", "block"), [(1376, 32), (96, 32), (128, 128), (384, 128)])
def test_blocks_divide_any_width(columns: int, block: int) -> None:
    weight, x = draw(32, n=8, k=columns, tokens=64)
    form = rotation.solve(weight, statistic(x), bits=3, group=128)
    assert isinstance(form, Rotated)
    assert form.block == block
    nearest = rtn.solve(weight, bits=3, group=128)
    assert output_error(weight, form, x) < output_error(weight, nearest, x)


def test_an_odd_width_is_left_to_gptq() -> None:
    weight, x = draw(33, k=41)
    form = rotation.solve(weight, statistic(x), bits=3, group=16)
    assert isinstance(form, Grouped)


def test_signs_are_the_same_every_time() -> None:
    weight, x = draw(34)
    first, second = (rotation.solve(weight, statistic(x), bits=2, group=8) for _ in range(2))
    assert isinstance(first, Rotated)
    assert isinstance(second, Rotated)
    assert torch.equal(first.signs, second.signs)
    assert torch.equal(first.dense(), second.dense())
    assert set(first.signs.tolist()) == {-1, 1}


def test_a_rotated_form_is_stored_and_computed_as_it_means() -> None:
    weight, x = draw(35, n=33, k=96)
    form = rotation.solve(weight, statistic(x), bits=4, group=32)
    stored = pack(form.stored_as(torch.bfloat16))
    torch.testing.assert_close(unpack(stored).dense(), form.dense(), rtol=1e-3, atol=1e-4)
    assert form.nbytes < stored.nbytes * 1.5
    layer = make_linear(stored, torch.ones(33), dtype=torch.float32)
    product = x[:9] @ form.dense().t() + 1
    assert float((layer(x[:9]) - product).norm()) < 0.02 * float(product.norm())


@pytest.mark.parametrize("block", [0, 3, 64, 8192])
def test_blocks_that_do_not_fit_are_refused(block: int) -> None:
    weight, x = draw(36, n=16, k=96)
    stored = pack(rotation.solve(weight, statistic(x), bits=4, group=32))
    stored.meta["block"] = block
    with pytest.raises(ValueError, match="Hadamard blocks"):
        make_linear(stored, None, dtype=torch.float32)
