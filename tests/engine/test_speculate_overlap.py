"""Steps with drafts between steps that are launched ahead, on `test_overlap`'s made-up device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine import core as core_module
from gateway.engine.core import Core, LocalOptions
from gateway.engine.payoff import Choice, Offer
from gateway.engine.tokenizer import Tokenizer

from .speculating import Always
from .test_overlap import (
    LAYOUT,
    SIZE,
    Device,
    Following,
    Leading,
    Wish,
    alone,
    as_on_a_device,
    attach,
    near,
    play,
    wishes,
)


class Sometimes(Always):
    """Drafts in every `period`-th step, by whoever's turn it is."""

    period, asked = 3, 0

    def due(self, batch: int) -> bool:
        self.asked += 1
        return self.asked // 2 % self.period == 0  # it is asked twice where it says yes

    def choose(
        self, batch: int, offers: Mapping[str, Sequence[Offer]], places: int
    ) -> Choice | None:
        at = self.asked % len(offers)
        names = [*offers][at:] + [*offers][:at]
        return super().choose(batch, {name: offers[name] for name in names}, places)


def drafting_core(kind: type[Following], blocks: int, period: int) -> Core:
    """Levels `a` and `b` as in `test_overlap`, and `m@c`, which says what `a` does."""
    device = Device(np.full(blocks * SIZE, -7))
    salts = iter(("a", "b", "a"))
    options = LocalOptions(
        max_num_seqs=16,
        prefill_chunk=6,
        block_size=SIZE,
        max_waiting=99,
        kv_bytes=blocks * LAYOUT.block_bytes(SIZE),
        speculate="auto",
    )
    return Core(options, lambda model, pool, max_batch: kind(next(salts), device))


@given(
    st.lists(wishes(), min_size=1, max_size=7),
    st.integers(10, 30),
    st.sampled_from([1, 2, 5]),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_everyone_gets_what_he_gets_alone(
    bytes_tokenizer: Tokenizer, script: list[Wish], blocks: int, period: int, late: bool
) -> None:
    for kind in (Following, Leading):
        core = drafting_core(kind, blocks, period)
        attach(core, bytes_tokenizer, ["a", "b", "m@c"])
        for variant in core._variants.values():
            assert variant.speculator is not None
            assert len(variant.speculator.drafters) == 3
            payoff = variant.speculator.payoff = variant.speculator.sampled = Sometimes()
            payoff.period = period
        with pytest.MonkeyPatch.context() as patch:
            if late:
                patch.setattr(core_module, "launch", as_on_a_device)
            got = play(core, bytes_tokenizer, script)
        for wish, mine in zip(script, got, strict=True):
            whole = alone(bytes_tokenizer, wish)
            assert near(mine, whole[: len(mine)])
            assert len(mine) == len(whole) or wish.leaves is not None


def test_drafts_are_kept_there(bytes_tokenizer: Tokenizer) -> None:
    core = drafting_core(Leading, 30, 2)
    attach(core, bytes_tokenizer, ["a", "b", "m@c"])
    for variant in core._variants.values():
        assert variant.speculator is not None
        variant.speculator.payoff = Sometimes()
    wish = Wish([68, 69], 40, "a", 0, None, {"temperature": 0.0, "ignore_eos": True}, False)
    (got,) = play(core, bytes_tokenizer, [wish])
    assert [token for _, token, *_ in got] == [
        token for _, token, *_ in alone(bytes_tokenizer, wish)
    ]
    stats = core.stats("a")
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
