"""The compiled decode attention writes the bytes and computes the numbers of the torch path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressors.kv_scheme import KVScheme
from gateway.engine.attention import LayerShape, Layout, Mode, Rows, Scoring, Step
from gateway.engine.kernels.native import Feature, library
from gateway.engine.kv_quant import QuantKV, QuantPool

ROWS, CONTEXT = 4, 3  # the last row is padding

pytestmark = pytest.mark.skipif(library(Feature.KV) is None, reason="no native kernels here")


def new_layer(layout: Layout, scheme: KVScheme, *, native: bool) -> tuple[QuantKV, Tensor]:
    (layer,) = QuantPool(layout, scheme, 1 + ROWS + ROWS * CONTEXT, "cpu").layers
    assert layer._native is not None
    if not native:
        layer._native = None
    return layer, layer._blocks


def step_at(positions: list[int], tables: Tensor, scheme: KVScheme, window: int | None) -> Step:
    """What the runner stages for rows at these positions."""
    size = scheme.group
    own = torch.tensor([at // size for at in positions])
    writes = tables[torch.arange(ROWS), own] * size + torch.tensor(positions) % size
    writes[-1] = 0
    columns = torch.arange(CONTEXT * size)
    behind = torch.tensor(positions)[:, None] - columns
    hidden = (behind < 0) | (behind >= (window or CONTEXT * size))
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    tails = torch.arange(1, 1 + ROWS) if scheme.tail_blocks else writes // size
    return Step(
        Mode.DECODE,
        writes=writes,
        tables=tables.reshape(-1),
        tails=tails,
        own=own,
        complete=[i for i, at in enumerate(positions[:-1]) if (at + 1) % size == 0],
        masks=[mask.view(ROWS, 1, 1, -1)],
        windows=[window],
    )


@pytest.mark.parametrize(
    "sizes",  # key-value heads, queries per head, key and value dim, tokens per group
    [
        pytest.param((3, 1, 64, 64, 32), id="plain"),
        pytest.param((2, 4, 128, 128, 32), id="grouped-query-two-value-groups"),
        pytest.param((2, 2, 12, 20, 8), id="small"),
        pytest.param((1, 1, 67, 67, 16), id="odd"),
    ],
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (11, 30.0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_native_and_torch_agree(
    bits: int, window: int | None, softcap: float | None, sizes: tuple[int, int, int, int, int]
) -> None:
    heads, per_head, key_dim, value_dim, group = sizes
    scheme = KVScheme(bits, group)
    layout = Layout((LayerShape(heads, key_dim, value_dim),), torch.float32, scheme)
    native, native_blocks = new_layer(layout, scheme, native=True)
    plain, plain_blocks = new_layer(layout, scheme, native=False)
    tables = torch.arange(1 + ROWS, 1 + ROWS + ROWS * CONTEXT).view(ROWS, CONTEXT)
    tables[-1] = 0
    random = torch.Generator().manual_seed(bits)
    large = 5 * torch.randn(heads, 1, key_dim, generator=random)  # a channel's own level
    for at in range(2 * group + 2):
        # Rows that complete a group at different times; the first one from its first token on.
        positions = [at, min(at + 3, CONTEXT * group - 1), at // 2, 0]
        step = step_at(positions, tables, scheme, window)
        rows = Rows(
            torch.randn(ROWS, heads * per_head, 1, key_dim, generator=random),
            torch.randn(ROWS, heads, 1, key_dim, generator=random) + large,
            torch.randn(ROWS, heads, 1, value_dim, generator=random),
        )
        found = native.decode(rows, 0, Scoring(None, softcap), step)
        expected = plain.decode(rows, 0, Scoring(None, softcap), step)
        torch.testing.assert_close(found[:-1], expected[:-1], atol=2e-5, rtol=1e-4)
        assert torch.isfinite(found).all()
        # Block 0 is scratch: the kernel leaves padding rows out.
        last = ROWS if scheme.tail_blocks else 0
        kept = [b for b in range(1, len(native_blocks)) if b != last]
        assert torch.equal(native_blocks[kept], plain_blocks[kept])
