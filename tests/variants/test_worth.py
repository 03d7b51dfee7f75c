"""Which levels leave for others: compared with every possible choice."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.variants.worth import HALF_LIFE_S, Demand, Holding, leaving, occupied, partings


@st.composite
def held(draw: st.DrawFn, *, shared: bool) -> list[Holding]:
    count = draw(st.integers(1, 7))
    return [
        Holding(
            name=f"level-{index}",
            place=f"place-{draw(st.integers(0, 2)) if shared else index}",
            bytes=draw(st.integers(1, 50)),
            rate=draw(st.floats(0, 10)),
            reload_s=draw(st.floats(0.001, 5)),
            last_used=draw(st.floats(0, 1000)),
            kept=draw(st.sampled_from(["", "", "", "pinned", "in use"])),
        )
        for index in range(count)
    ]


def size(holdings: list[Holding] | tuple[Holding, ...]) -> int:
    return occupied((one.place, one.bytes) for one in holdings)


def without(holdings: list[Holding], gone: tuple[Holding, ...]) -> list[Holding]:
    return [one for one in holdings if one not in gone]


def least_loss(holdings: list[Holding], need: int) -> float | None:
    """By trying every set of levels that may leave."""
    free = [one for one in holdings if not one.kept]
    losses = [
        sum(one.value for one in gone)
        for count in range(len(free) + 1)
        for gone in combinations(free, count)
        if size(holdings) - size(without(holdings, gone)) >= need
    ]
    return min(losses, default=None)


@given(held(shared=True), st.integers(-5, 200))
def test_room_is_made_whenever_it_can_be_and_nobody_leaves_who_must_stay(
    holdings: list[Holding], need: int
) -> None:
    gone = leaving(holdings, need)
    if least_loss(holdings, need) is None:
        assert gone is None
        return
    assert gone is not None
    assert not any(one.kept for one in gone)
    assert len(set(gone)) == len(gone)
    assert size(holdings) - size(without(holdings, gone)) >= need


@given(held(shared=False), st.integers(1, 200))
def test_what_is_lost_is_at_most_twice_the_least_possible(
    holdings: list[Holding], need: int
) -> None:
    gone, least = leaving(holdings, need), least_loss(holdings, need)
    if gone is None or least is None:
        return
    assert sum(one.value for one in gone) <= 2 * least * (1 + 1e-9) + 1e-12


@given(held(shared=False), st.integers(1, 200))
def test_nobody_leaves_in_vain(holdings: list[Holding], need: int) -> None:
    gone = leaving(holdings, need)
    for spared in gone or ():
        rest = tuple(one for one in gone or () if one is not spared)
        assert size(holdings) - size(without(holdings, rest)) < need


def level(name: str, *, megabytes: int = 10, rate: float = 1.0, **more: object) -> Holding:
    fields = {"place": name, "reload_s": 1.0, "last_used": 0.0, **more}
    return Holding(name=name, bytes=megabytes, rate=rate, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("holdings", "need", "gone"),
    [
        ([level("asked", rate=2), level("forgotten", rate=0.1)], 5, ["forgotten"]),
        ([level("dear", reload_s=9.0), level("cheap", reload_s=0.1)], 5, ["cheap"]),
        ([level("large", megabytes=40), level("small", megabytes=10)], 5, ["large"]),
        ([level("new", rate=0, last_used=9), level("old", rate=0, last_used=1)], 5, ["old"]),
        ([level("pinned", rate=0, kept="pinned"), level("asked")], 5, ["asked"]),
        ([level("pinned", rate=0, kept="pinned")], 5, None),
        # The bytes of the smaller one are among the larger one's: it stays or both go.
        (
            [level("int8", place="nested"), level("int4", place="nested", megabytes=5)],
            5,
            ["int8"],
        ),
        (
            [level("kv8", place="shared"), level("kv4", place="shared")],
            10,
            ["kv4", "kv8"],
        ),
        (
            [level("int8", place="nested"), level("int4", place="nested", megabytes=10, kept="x")],
            5,
            None,
        ),
    ],
)
def test_who_leaves(holdings: list[Holding], need: int, gone: list[str] | None) -> None:
    found = leaving(holdings, need)
    assert (None if found is None else sorted(one.name for one in found)) == gone


def test_partings_start_with_the_cheapest_byte() -> None:
    ways = partings([level("a", rate=3), level("b", rate=1), level("c", rate=2)])
    assert [way.levels[0].name for way in ways] == ["b", "c", "a"]


def test_demand_is_the_rate_of_steady_traffic_and_halves_when_it_stops() -> None:
    demand = Demand()
    for tick in range(20_000):
        demand.count(tick * 0.5)
    assert math.isclose(demand.per_second(10_000.0), 2.0, rel_tol=0.01)
    assert math.isclose(
        demand.per_second(10_000.0 + HALF_LIFE_S), demand.per_second(10_000.0) / 2, rel_tol=1e-6
    )
    assert Demand().per_second(5.0) == 0.0
