"""Storage layouts: nothing is lost, nothing is padded out of proportion, blobs stay shareable."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressors.tensor import Dense, Grouped, LinearForm, LowRank, Sparse24, StoredLinear
from gateway.engine.kernels.store import pack, unpack
from tests.engine.kernels.forms import dense, every, grouped, sparse

KINDS = sorted(every())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_the_weight(kind: str) -> None:
    form = every()[kind]
    back = unpack(pack(form))
    assert type(back) is type(form)
    assert back.shape == form.shape
    # fp16 scales: half an ulp, on every factor of a product.
    exact = form.dense(torch.float64)
    torch.testing.assert_close(
        back.dense(torch.float64), exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max())
    )


@st.composite
def any_grouped(draw: st.DrawFn) -> Grouped:
    return grouped(
        (draw(st.integers(1, 40)), draw(st.integers(1, 90))),
        bits=draw(st.integers(2, 8)),
        group=draw(st.integers(1, 100)),
        zeros=draw(st.sampled_from(["symmetric", "whole"])),
        perm=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(form=any_grouped())
def test_codes_zeros_and_order_are_exact(form: Grouped) -> None:
    back = unpack(pack(form))
    assert isinstance(back, Grouped)
    assert (back.bits, back.group) == (form.bits, form.group)
    assert torch.equal(back.codes, form.codes)
    assert torch.equal(back.zeros, form.zeros)
    assert (back.perm is None) == (form.perm is None)
    if form.perm is not None:
        assert back.perm is not None
        assert torch.equal(back.perm, form.perm)
    torch.testing.assert_close(back.scales, form.scales, rtol=2**-11, atol=0)


@pytest.mark.parametrize("top", [1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_scales_keep_fp16_precision_at_any_magnitude(top: float) -> None:
    form = grouped((16, 64))
    form = Grouped(form.codes, form.scales / form.scales.max() * top, form.zeros, 4, 64)
    back = unpack(pack(form))
    assert isinstance(back, Grouped)
    torch.testing.assert_close(back.scales, form.scales, rtol=2**-11, atol=0)


def test_scales_that_are_not_finite_are_refused() -> None:
    form = grouped((16, 64))
    form.scales[3, 0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        pack(form)


def test_zero_scales_make_zero_weights() -> None:
    form = grouped((16, 64))
    form.scales.zero_()
    assert not unpack(pack(form)).dense().any()


def bits_per_weight(stored: StoredLinear) -> float:
    return stored.nbytes * 8 / (int(stored.meta["n"]) * int(stored.meta["k"]))


@pytest.mark.parametrize(
    ("form", "most"),
    [
        pytest.param(lambda: grouped((512, 384)), 4.25, id="int4-g64-symmetric"),
        pytest.param(lambda: grouped((512, 384), zeros="whole"), 4.375, id="int4-g64-asymmetric"),
        pytest.param(lambda: grouped((512, 384), zeros="fraction"), 4.5, id="int4-g64-hqq"),
        pytest.param(lambda: grouped((512, 384), bits=3, group=128), 3.125, id="int3-g128"),
        pytest.param(lambda: grouped((512, 384), bits=2), 2.25, id="int2-g64"),
        pytest.param(lambda: grouped((512, 384), bits=8, group=384), 8.05, id="int8-channel"),
        pytest.param(lambda: sparse((512, 384)), 9.0, id="sparse24-bf16"),
        pytest.param(
            lambda: sparse((512, 384), grouped((512, 192), bits=8, group=192)),
            5.05,
            id="sparse-int8",
        ),
        pytest.param(lambda: LowRank(dense((512, 96)), dense((96, 384))), 7.0, id="lowrank"),
    ],
)
def test_bytes_are_what_the_level_promises(form: Callable[[], LinearForm], most: float) -> None:
    assert bits_per_weight(pack(form())) <= most


def test_symmetric_forms_store_no_zeros() -> None:
    assert "zeros" not in pack(grouped((16, 64))).tensors
    assert "zeros" in pack(grouped((16, 64), zeros="whole")).tensors


def test_a_dense_weight_is_stored_as_the_very_tensor() -> None:
    weight = torch.randn(24, 40)
    assert pack(Dense(weight)).tensors["weight"].data_ptr() == weight.data_ptr()


def test_layout_survives_a_file(tmp_path: Path) -> None:
    stored = pack(sparse((33, 100), grouped((33, 50), group=32, zeros="fraction")))
    save_file(dict(stored.tensors), tmp_path / "w.safetensors")
    again = StoredLinear(
        stored.scheme, stored.layout, stored.meta, load_file(tmp_path / "w.safetensors")
    )
    assert torch.equal(unpack(again).dense(), unpack(stored).dense())


def test_unknown_schemes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown storage scheme 'ternary'.*dense"):
        unpack(StoredLinear("ternary", "x", {}, {}))


def test_an_index_that_keeps_a_column_twice_is_refused() -> None:
    form = sparse((16, 32))
    form.index[0, :2] = 1
    with pytest.raises(ValueError, match="twice"):
        pack(form)


def test_sparse_values_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="2:4"):
        pack(Sparse24(dense((16, 15)), sparse((16, 32)).index))
