"""Bit packing is exact and as small as the bits say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressors.packing import BITS, pack, packed_width, unpack


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 4),
    columns=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits))
    assert packed.numel() * 8 < rows * (columns * bits + 8) or not rows
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_little_endian_by_bit(bits: int) -> None:
    codes = [(3 * i + 1) % 2**bits for i in range(11)]
    expected = sum(code << (i * bits) for i, code in enumerate(codes))
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert int.from_bytes(bytes(packed[0].tolist()), "little") == expected


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="bits must be"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(1, 1), 4)
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 4, 4)
