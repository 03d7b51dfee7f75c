"""The evictor as a function: its promises over random artifacts with shared blobs."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from cache.eviction import Candidate, choose_victims, freed_bytes

SIZES = {f"blob{i}": size for i, size in enumerate([0, 1, 1, 5, 10, 64, 100, 1000])}


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(0, 6))
    return [
        Candidate(
            key=f"key{i}",
            blobs={name: SIZES[name] for name in draw(st.sets(st.sampled_from(sorted(SIZES))))},
            rebuild_seconds=draw(st.floats(0, 1e4)),
            uses=draw(st.floats(0, 100)),
            last_used=draw(st.floats(0, 1e9)),
            pinned=draw(st.booleans()),
        )
        for i in range(count)
    ]


NEED = st.integers(-5, 1500)


@given(candidates(), NEED)
def test_enough_is_freed_exactly_when_it_is_possible(found: list[Candidate], need: int) -> None:
    victims = choose_victims(found, need)
    most = freed_bytes(found, [c.key for c in found if not c.pinned])
    if 0 < need <= most:
        assert freed_bytes(found, victims) >= need
    else:
        assert victims == []


@given(candidates(), NEED)
def test_nothing_pinned_nothing_unknown_nothing_twice(found: list[Candidate], need: int) -> None:
    victims = choose_victims(found, need)
    assert set(victims) <= {c.key for c in found if not c.pinned}
    assert len(set(victims)) == len(victims)


@given(candidates(), NEED)
def test_no_victim_is_superfluous(found: list[Candidate], need: int) -> None:
    victims = choose_victims(found, need)
    for key in victims:
        assert freed_bytes(found, [k for k in victims if k != key]) < need


@given(candidates(), NEED, st.randoms(use_true_random=False))
def test_the_order_given_does_not_matter(
    found: list[Candidate], need: int, shuffler: random.Random
) -> None:
    mixed = found.copy()
    shuffler.shuffle(mixed)
    assert choose_victims(mixed, need) == choose_victims(found, need)


@given(candidates())
def test_freed_bytes_is_what_no_survivor_holds(found: list[Candidate]) -> None:
    for count in range(len(found) + 1):
        for gone in itertools.combinations(found, count):
            kept = [c for c in found if c not in gone]
            before = set().union(*(c.blobs for c in found)) if found else set()
            after = set().union(*(c.blobs for c in kept)) if kept else set()
            expected = sum(SIZES[name] for name in before - after)
            assert freed_bytes(found, [c.key for c in gone]) == expected


def one(key: str, size: int = 100, seconds: float = 10.0, uses: float = 1.0) -> Candidate:
    return Candidate(key=key, blobs={key: size}, rebuild_seconds=seconds, uses=uses)


def test_cheap_rare_and_large_go_first() -> None:
    cheap = [one("a"), one("b", seconds=1)]
    rare = [one("a"), one("b", uses=0.1)]
    large = [one("a"), one("b", size=1000)]
    for pair in (cheap, rare, large):
        assert choose_victims(pair, 50) == ["b"]


def test_bytes_shared_with_a_survivor_do_not_count() -> None:
    shared = {"embedding": 1000}
    big_but_shared = Candidate("a", {**shared, "a": 10}, rebuild_seconds=1, uses=1)
    keeper = Candidate("k", shared, pinned=True)
    small_own = Candidate("b", {"b": 20}, rebuild_seconds=1, uses=1)
    assert choose_victims([big_but_shared, keeper, small_own], 10) == ["b"]


def test_twins_that_share_everything_go_together() -> None:
    twins = [Candidate("a", {"x": 100}, 1, 1), Candidate("b", {"x": 100}, 1, 1)]
    assert sorted(choose_victims(twins, 50)) == ["a", "b"]
