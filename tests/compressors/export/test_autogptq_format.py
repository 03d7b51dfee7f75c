"""The tensor layout: against plain bit arithmetic, round trips, and AutoGPTQ's own layer."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressors.export.autogptq_format import (
    BITS,
    VERSIONS,
    GptqFormatError,
    GptqTensors,
    Version,
    from_gptq,
    pack_words,
    to_gptq,
    unpack_words,
)
from compressors.quantize.autogptq_compat import load
from compressors.tensor import Grouped

needs_autogptq = pytest.mark.skipif(
    find_spec("auto_gptq") is None, reason="pip install 'pressgate[auto-gptq]' to run this"
)


def make_form(
    bits: int,
    *,
    n: int = 64,
    k: int = 96,
    group: int = 32,
    symmetric: bool = False,
    order: bool = False,
    seed: int = 0,
    lowest_zero: int = 1,
) -> Grouped:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    codes = torch.randint(2**bits, (n, k), generator=generator).to(torch.uint8)
    scales = torch.rand(n, groups, generator=generator).half().float() + 0.0009765625
    zeros = torch.randint(lowest_zero, 2**bits, (n, groups), generator=generator).float()
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    shuffled = torch.randperm(k, generator=generator)
    perm = (torch.arange(k) // group)[shuffled].to(torch.int32) if order else None
    return Grouped(codes, scales.half().float(), zeros, bits, group, perm)


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
)
def test_words_are_one_little_endian_bit_stream(
    bits: int, rows: int, blocks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, 32 * blocks), generator=generator).to(torch.uint8)
    packed = pack_words(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, bits * blocks)
    for row in range(rows):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[row]))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(bits * blocks)]
        assert [int(word) & 0xFFFFFFFF for word in packed[row]] == words
    assert torch.equal(unpack_words(packed, bits), codes)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    shape=st.sampled_from([(32, 32, 32), (64, 96, 32), (96, 64, 64), (32, 160, 64), (64, 96, 96)]),
    kind=st.sampled_from(["symmetric", "asymmetric", "symmetric act-order", "act-order"]),
    version=st.sampled_from(VERSIONS),
    seed=st.integers(0, 1000),
)
def test_round_trip_is_exact(
    bits: int, shape: tuple[int, int, int], kind: str, version: Version, seed: int
) -> None:
    n, k, group = shape
    form = make_form(
        bits,
        n=n,
        k=k,
        group=group,
        symmetric=kind.startswith("symmetric"),
        order=kind.endswith("act-order"),
        seed=seed,
        lowest_zero=0 if version == "gptq_v2" else 1,
    )
    back = from_gptq(to_gptq(form, version), bits, group, version)
    assert torch.equal(back.codes, form.codes)
    assert torch.equal(back.zeros, form.zeros)
    assert torch.equal(back.scales, form.scales)
    assert torch.equal(back.group_index(), form.group_index())
    assert (back.bits, back.group) == (form.bits, form.group)
    assert torch.equal(back.dense(), form.dense())


def test_columns_in_order_need_no_permutation() -> None:
    form = make_form(4)
    stored = to_gptq(form)
    assert stored.g_idx is not None
    assert from_gptq(stored, 4, 32).perm is None
    without = GptqTensors(stored.qweight, stored.qzeros, stored.scales, None)
    assert torch.equal(from_gptq(without, 4, 32).dense(), form.dense())
    stand_in = GptqTensors(
        stored.qweight, stored.qzeros, stored.scales, torch.zeros(96, dtype=torch.int32)
    )
    assert torch.equal(from_gptq(stand_in, 4, 32).dense(), form.dense())


def test_the_two_versions_differ_by_one_in_every_zero_point() -> None:
    form = make_form(4)
    first, second = to_gptq(form, "gptq"), to_gptq(form, "gptq_v2")
    assert torch.equal(unpack_words(second.qzeros, 4) - 1, unpack_words(first.qzeros, 4))
    assert torch.equal(first.qweight, second.qweight)


def test_a_zero_point_of_zero_needs_version_two() -> None:
    form = make_form(4)
    form.zeros[3, 1] = 0
    with pytest.raises(GptqFormatError, match=r"outside 1\.\.15"):
        to_gptq(form, "gptq")
    assert torch.equal(from_gptq(to_gptq(form, "gptq_v2"), 4, 32, "gptq_v2").zeros, form.zeros)


def test_reading_a_wrapped_zero_point_gives_zero_as_autogptq_does() -> None:
    stored = to_gptq(make_form(4, symmetric=True))
    wrapped = GptqTensors(
        stored.qweight, torch.full_like(stored.qzeros, -1), stored.scales, stored.g_idx
    )
    assert not from_gptq(wrapped, 4, 32).zeros.any()


def test_scales_round_to_float16() -> None:
    form = make_form(4)
    form.scales[0, 0] = 0.1  # no float16
    back = from_gptq(to_gptq(form), 4, 32)
    assert float(back.scales[0, 0]) == float(torch.tensor(0.1).half())


def five_bits() -> Grouped:
    return make_form(5)


def odd_rows() -> Grouped:
    return make_form(4, n=40)


def odd_columns() -> Grouped:
    return make_form(4, k=80, group=16)


def fractional() -> Grouped:
    form = make_form(4)
    form.zeros[0, 0] += 0.5
    return form


def too_high() -> Grouped:
    form = make_form(4)
    form.zeros[0, 0] = 16
    return form


def too_large() -> Grouped:
    form = make_form(4)
    form.scales[0, 0] = 1e6
    return form


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (five_bits, "5 bits"),
        (odd_rows, "40x96"),
        (odd_columns, "64x80"),
        (fractional, "fractional"),
        (too_high, "zero points"),
        (too_large, "float16"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(make, message: str) -> None:
    with pytest.raises(GptqFormatError, match=message):
        to_gptq(make())


def broken(**parts: Tensor) -> GptqTensors:
    stored = to_gptq(make_form(4))
    whole = {name: getattr(stored, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return GptqTensors(**(whole | parts))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken(qweight=torch.zeros(12, 64)), "qweight is torch.float32"),
        (broken(qzeros=torch.zeros(3, 8, dtype=torch.int64)), "qzeros is torch.int64"),
        (broken(qzeros=torch.zeros(3, 7, dtype=torch.int32)), r"qzeros are \[3, 7\]"),
        (broken(scales=torch.zeros(2, 64)), r"scales are \[2, 64\], expected \[3, 64\]"),
        (broken(scales=torch.full((3, 64), float("nan"))), "not finite"),
        (broken(scales=torch.zeros(3, 64, dtype=torch.int32)), "scales are torch.int32"),
        (broken(g_idx=torch.full((96,), 3, dtype=torch.int32)), r"outside 0\.\.2"),
        (broken(g_idx=torch.full((96,), -1, dtype=torch.int32)), r"outside 0\.\.2"),
        (broken(g_idx=torch.zeros(95, dtype=torch.int32)), r"expected \[96\]"),
    ],
)
def test_malformed_tensors_are_named(tensors: GptqTensors, message: str) -> None:
    with pytest.raises(GptqFormatError, match=message):
        from_gptq(tensors, 4, 32)


@pytest.mark.parametrize(("bits", "group"), [(5, 32), (4, 0), (4, -2)])
def test_settings_are_checked(bits: int, group: int) -> None:
    with pytest.raises(GptqFormatError):
        from_gptq(broken(), bits, group)


@needs_autogptq
@pytest.mark.parametrize("order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("bits", BITS)
def test_autogptqs_own_layer_computes_the_same_weight(bits: int, order: bool) -> None:
    """AutoGPTQ's CPU layer, filled with our tensors, is fed the identity: it shows its weight."""
    layers = load().nn_modules.qlinear
    kind = layers.qlinear_cuda if order else layers.qlinear_cuda_old
    # Zero points of version 1 from 1 up; theirs takes 0 only from a wrapped one.
    form = make_form(bits, n=64, k=128, group=32, order=order, symmetric=bits == 3)
    layer = kind.QuantLinear(bits, 32, 128, 64, bias=False, weight_dtype=torch.float32)
    stored = to_gptq(form)
    layer.load_state_dict(
        {
            "qweight": stored.qweight,
            "qzeros": stored.qzeros,
            "scales": stored.scales.float(),
            "g_idx": stored.g_idx,
        }
    )
    shown = layer(torch.eye(128)).t()
    assert torch.allclose(shown, form.dense(), rtol=0, atol=1e-6)
