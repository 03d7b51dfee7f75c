"""What children take over from their parents."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.inherit import BrokenChain, lineage, parents_first, resolve_all, resolved
from gateway.policy.policy import Match, Policy


def named(*policies: Policy) -> dict[str, Policy]:
    return {policy.name: policy for policy in policies}


BASE = Policy(
    name="base", ttft_ms=300, max_ppl_ratio=1.1, objective="latency", match=Match(path="/x")
)


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        pytest.param({}, {"ttft_ms": 300, "objective": "latency"}, id="everything"),
        pytest.param({"ttft_ms": 900}, {"ttft_ms": 900, "max_ppl_ratio": 1.1}, id="a looser bound"),
        pytest.param({"ttft_ms": None}, {"ttft_ms": None}, id="null lifts a bound"),
        pytest.param({"objective": "quality"}, {"objective": "quality"}, id="a written default"),
        pytest.param({}, {"match": Match()}, id="not whom it applies to"),
        pytest.param({"match": Match(path="/y")}, {"match": Match(path="/y")}, id="its own match"),
    ],
)
def test_a_child_overrides_its_parent(child: dict[str, Any], expected: dict[str, Any]) -> None:
    policies = named(BASE, Policy(name="child", extends="base", **child))
    found = resolved(policies["child"], policies)
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.name, found.extends) == ("child", "base")


def test_a_grandchild_follows_its_grandparent() -> None:
    middle = Policy(name="middle", extends="base", tpot_ms=20)
    last = Policy(name="last", extends="middle", memory_mb=9)
    for ttft in (300, 100):
        base = BASE.model_copy(update={"ttft_ms": ttft})
        found = resolved(last, named(base, middle, last))
        assert (found.ttft_ms, found.tpot_ms, found.memory_mb) == (ttft, 20, 9)


@pytest.mark.parametrize(
    ("links", "at_fault", "message"),
    [
        ({"a": "b"}, "a", "no policy 'b'; there are: a"),
        ({"a": "a"}, "a", "cannot extend itself: a → a"),
        ({"a": "b", "b": "c", "c": "b"}, "c", "b → c → b"),
    ],
)
def test_broken_chains_say_where(links: dict[str, str], at_fault: str, message: str) -> None:
    policies = named(*(Policy(name=name, extends=to, tpot_ms=3) for name, to in links.items()))
    with pytest.raises(BrokenChain, match=message) as broken:
        lineage(policies["a"], policies)
    assert broken.value.name == at_fault
    active, faults = resolve_all(policies)
    assert faults.keys() == links.keys()
    assert active["a"].tpot_ms == 3


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "ttft_ms": st.none() | st.floats(1, 1000),
    "max_ppl_ratio": st.none() | st.floats(1, 3),
    "objective": st.sampled_from(["quality", "latency"]),
    "build": st.booleans(),
    "levels": st.lists(st.sampled_from(["int8", "bf16"]), max_size=2).map(tuple),
}
written = st.fixed_dictionaries({}, optional=FIELDS)


@given(st.lists(written, min_size=1, max_size=6))
def test_the_nearest_ancestor_that_writes_a_field_gives_it(line: list[dict[str, Any]]) -> None:
    policies = named(
        *(
            Policy(name=f"p{i}", **({"extends": f"p{i + 1}"} if i + 1 < len(line) else {}), **own)
            for i, own in enumerate(line)
        )
    )
    found = resolved(policies["p0"], policies)
    for name in FIELDS:
        expected = next((own[name] for own in line if name in own), getattr(Policy(name="x"), name))
        assert getattr(found, name) == expected


@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("abcdefgh") | st.none()))
def test_parents_come_first_or_a_circle_is_told(links: dict[str, str | None]) -> None:
    policies = named(*(Policy(name=name, extends=to) for name, to in links.items()))
    if _circular(links):
        with pytest.raises(BrokenChain, match="cannot extend itself"):
            parents_first(policies)
        return
    ordered = [policy.name for policy in parents_first(policies)]
    assert sorted(ordered) == sorted(links)
    for name, to in links.items():
        assert to not in links or ordered.index(to) < ordered.index(name)


def _circular(links: dict[str, str | None]) -> bool:
    """Whoever follows more links than there are is going round."""
    for name in links:
        at: str | None = name
        for _ in range(len(links) + 1):
            at = links.get(at) if at is not None else None
        if at is not None:
            return True
    return False
