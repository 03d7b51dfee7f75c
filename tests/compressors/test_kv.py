"""Keys per channel, values per token: the codec of a quantized KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.checkpoint import Checkpoint
from compressors.kv_scheme import KVScheme, channel_groups, scheme_of
from compressors.memory import MemorySink
from compressors.pipeline import compress
from compressors.quantize import kv
from compressors.recipe import Recipe, RecipeError

DIMS = [8, 12, 64, 67, 80, 128]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step_and_take_the_bytes_that_are_counted(
    bits: int, dim: int
) -> None:
    scheme = KVScheme(bits, 16)
    keys, values = normal(3, 2, 16, dim) + 2 * normal(dim, seed=1), normal(5, 2, dim, seed=2)
    stored = kv.encode_keys(scheme, keys)
    assert stored.shape == (3, 2, scheme.key_bytes(dim))
    decoded = kv.decode_keys(scheme, stored, dim)
    assert bool(((decoded.dense() - keys).abs() <= 0.5001 * decoded.step).all())

    stored = kv.encode_values(scheme, values)
    assert stored.shape == (5, 2, scheme.value_bytes(dim))
    decoded = kv.decode_values(scheme, stored, dim)
    error = (decoded.dense().flatten(-2) - values).abs().view(decoded.codes.shape)
    assert bool((error <= 0.5001 * decoded.step).all())

    stored = kv.encode_tail(values)
    assert stored.shape == (5, 2, scheme.tail_bytes(dim))
    assert float((kv.decode_tail(stored, dim) - values).abs().max()) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_is_hardly_wider_than_the_range_needs(bits: int) -> None:
    """One-byte steps and zero points cost at most 2**(1/8), and at 8 bits a sixteenth more."""
    keys = normal(50, 32, 64)
    step = kv.decode_keys(KVScheme(bits), kv.encode_keys(KVScheme(bits), keys), 64).step
    needed = (keys.amax(1, keepdim=True) - keys.amin(1, keepdim=True)) / (2**bits - 1)
    worst = float((step / needed).max())
    assert float((step / needed).min()) >= 1.0
    assert worst < 1.0906 * (1.0 if bits == 4 else 255 / 240)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([8, 4]),
    st.floats(1e-7, 1e3),
    st.floats(-1e3, 1e3),
    st.integers(0, 2**16),
)
def test_any_size_and_level_is_coded_within_a_step(
    bits: int, size: float, level: float, seed: int
) -> None:
    x = normal(4, 24, seed=seed) * size + level
    decoded = kv.decode_values(KVScheme(bits), kv.encode_values(KVScheme(bits), x), 24)
    error = (decoded.dense().flatten(-2) - x).abs()
    # The smallest step is 2**-20; float32 itself is no finer than 6e-8 of the level.
    assert bool((error <= 0.51 * decoded.step[..., 0] + 1e-6 + 2e-7 * abs(level)).all())


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(2, 32, 64)
    for bits in (8, 4):
        scheme = KVScheme(bits)
        assert not kv.decode_keys(scheme, kv.encode_keys(scheme, zeros), 64).dense().any()
        assert not kv.decode_values(scheme, kv.encode_values(scheme, zeros), 64).dense().any()
    assert not kv.decode_tail(kv.encode_tail(zeros), 64).any()


def test_two_codes_share_a_byte_and_bytes_are_final() -> None:
    keys = normal(1, 32, 64)
    scheme = KVScheme(4)
    stored = kv.encode_keys(scheme, keys)
    decoded = kv.decode_keys(scheme, stored, 64)
    packed = stored[0, : 32 * 32].view(32, 32)
    assert torch.equal(packed & 15, decoded.codes[0, :, :32])
    assert torch.equal(packed >> 4, decoded.codes[0, :, 32:])
    assert torch.equal(kv.encode_keys(scheme, keys.expand(3, -1, -1))[1], stored[0])


def test_channels_of_their_own_level_want_keys_per_channel() -> None:
    """The paper's section 3.1 (figure 2, table 2): keys with outlier channels lose far more when
    they are quantized per token; values without them do not."""
    outliers = torch.ones(64)
    outliers[::16] = 12.0
    keys, values = normal(32, 64) * 0.3 + outliers * normal(64, seed=3), normal(32, 64, seed=4)

    def per_channel(x: torch.Tensor) -> float:
        stored = kv.encode_keys(KVScheme(4), x)
        return float((kv.decode_keys(KVScheme(4), stored, 64).dense() - x).norm() / x.norm())

    def per_token(x: torch.Tensor) -> float:
        stored = kv.encode_values(KVScheme(4), x)
        dense = kv.decode_values(KVScheme(4), stored, 64).dense().flatten(-2)
        return float((dense - x).norm() / x.norm())

    assert per_token(keys) > 4 * per_channel(keys)
    assert per_token(values) < 1.25 * per_channel(values)


@pytest.mark.parametrize(
    ("dim", "most", "groups"),
    [(64, 64, 1), (128, 64, 2), (80, 64, 2), (80, 32, 4), (12, 64, 1), (67, 64, 1), (256, 64, 4)],
)
def test_heads_are_cut_into_equal_groups(dim: int, most: int, groups: int) -> None:
    assert channel_groups(dim, most) == groups


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_a_block_has_room_for_a_tail(bits: int, dim: int) -> None:
    for group in (8, 32):
        scheme = KVScheme(bits, group)
        tail = 3 * group * scheme.tail_bytes(dim)
        assert scheme.block_bytes(3, dim, dim) >= tail
        if not scheme.tail_blocks:
            assert scheme.key_room(3, dim) >= tail


def test_levels_name_their_scheme_and_come_last_in_a_stack() -> None:
    assert scheme_of(Recipe.parse("kv8")) == KVScheme(8)
    assert scheme_of(Recipe.parse("depth-75+int4-gptq-g128+kv4")) == KVScheme(4)
    assert scheme_of(Recipe.parse("int8")) is None
    assert scheme_of(Recipe.parse("bf16")) is None
    for wrong in ("kv4+int8", "kv8+kv4", "kv2", "bf16+kv8"):
        with pytest.raises(RecipeError):
            Recipe.parse(wrong)


def test_a_job_leaves_the_weights_as_they_are(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint("llama"))
    alone, with_int8, int8 = MemorySink(), MemorySink(), MemorySink()
    compress(checkpoint, Recipe.parse("kv4"), sink=alone)
    assert not alone.linears
    assert {*alone.tensors} == {*checkpoint.names}
    assert all(torch.equal(checkpoint.tensor(n), t) for n, t in alone.tensors.items())
    compress(checkpoint, Recipe.parse("int8+kv4"), sink=with_int8)
    compress(checkpoint, Recipe.parse("int8"), sink=int8)
    assert {*with_int8.linears} == {*int8.linears}
    assert with_int8.nbytes == int8.nbytes
