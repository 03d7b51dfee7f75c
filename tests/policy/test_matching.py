"""Which policy a request falls under: tables, and the remembering behind them against a naive
search."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.canary import Plan, Split
from gateway.policy.hours import Hours
from gateway.policy.matching import RequestFacts, Table
from gateway.policy.policy import DEFAULT, Match, Policy

MONDAY_NOON = 1_795_435_200.0  # 2026-11-23T12:00:00Z
NOON = Hours(start="12:00", end="13:00")


def table(*policies: Policy, splits: dict[str, Split] | None = None) -> Table:
    return Table({policy.name: policy for policy in (DEFAULT, *policies)}, splits)


def asked(**changes: Any) -> RequestFacts:
    return RequestFacts(**({"api_key": None, "path": "/chat", "model": "m"} | changes))


GOLD = Policy(name="gold", match=Match(metadata={"tier": "gold"}))
GOLD_EU = Policy(name="gold-eu", match=Match(metadata={"tier": "gold", "region": "eu"}))
LUNCH = Policy(name="lunch", match=Match(hours=NOON))
LUNCH_GOLD = Policy(name="lunch-gold", match=Match(hours=NOON, metadata={"tier": "gold"}))
PATH = Policy(name="path", match=Match(path="/chat"))
HEADER = Policy(name="header", match=Match(header={"X-Tier": "gold"}))
ALL = (GOLD, GOLD_EU, LUNCH, LUNCH_GOLD, PATH, HEADER)


@pytest.mark.parametrize(
    ("policies", "facts", "expected"),
    [
        pytest.param((GOLD,), asked(metadata={"tier": "gold", "x": "1"}), "gold", id="metadata"),
        pytest.param((GOLD,), asked(metadata={"tier": "Gold"}), "default", id="exactly"),
        pytest.param((GOLD,), asked(metadata={"TIER": "gold"}), "default", id="keys too"),
        pytest.param((GOLD,), asked(), "default", id="none given"),
        pytest.param(
            ALL, asked(metadata={"tier": "gold", "region": "eu"}), "gold-eu", id="two beat one"
        ),
        pytest.param(ALL, asked(metadata={"tier": "gold"}), "gold", id="metadata beats a path"),
        pytest.param(
            ALL,
            asked(metadata={"tier": "gold"}, headers={"x-tier": "gold"}),
            "header",
            id="a header beats metadata",
        ),
        pytest.param(
            ALL,
            asked(metadata={"tier": "gold"}, now=MONDAY_NOON),
            "lunch-gold",
            id="the hour counts as a condition",
        ),
        pytest.param(ALL, asked(now=MONDAY_NOON), "path", id="a path beats the hour"),
        pytest.param(ALL, asked(path="/x", now=MONDAY_NOON), "lunch", id="the hour alone"),
        pytest.param(ALL, asked(path="/x", now=MONDAY_NOON + 3600), "default", id="an hour later"),
    ],
)
def test_the_most_specific_wins(
    policies: tuple[Policy, ...], facts: RequestFacts, expected: str
) -> None:
    assert table(*policies).match(facts).name == expected
    assert table(*reversed(policies)).match(facts).name == expected


def test_metadata_and_hours_bind_nobody() -> None:
    found = table(GOLD, LUNCH)
    assert found.match(asked(api_key="k"), "lunch").name == "lunch"
    assert found.match(asked(api_key="k", metadata={"tier": "gold"}), "default").name == "default"


def test_a_candidate_takes_part_however_its_policy_is_found() -> None:
    candidate = Policy(name="path", match=PATH.match, ttft_ms=1)
    trial = Split(PATH, candidate, Plan(percent=99.999), "salt")
    found = table(PATH, splits={"path": trial})
    assert found.match(asked()) is candidate
    assert found.match(asked(path="/x"), "path") is candidate
    assert found.match(asked(path="/x")) == DEFAULT
    assert found.get("path") is PATH


texts = st.sampled_from(["a", "b"])
matches = st.builds(
    Match,
    api_key=st.lists(texts, max_size=1).map(tuple),
    path=st.none() | texts,
    model=st.none() | texts,
    header=st.dictionaries(texts, texts, max_size=2),
    metadata=st.dictionaries(texts, texts, max_size=2),
    hours=st.none() | st.just(NOON),
)
requests = st.builds(
    RequestFacts,
    api_key=st.none() | texts,
    path=texts,
    model=texts,
    headers=st.dictionaries(texts, texts),
    metadata=st.dictionaries(texts, texts),
    now=st.sampled_from([0.0, MONDAY_NOON]),
)


@given(st.lists(matches, max_size=8), st.lists(requests, min_size=1, max_size=6))
def test_what_is_remembered_changes_nothing(
    given_: list[Match], asked_: list[RequestFacts]
) -> None:
    """One table for all requests, in any order, finds what a naive search does for each."""
    found = table(*(Policy(name=f"p{i}", match=match) for i, match in enumerate(given_)))
    for facts in asked_:
        fitting = [policy for policy in found.ordered() if _fits(policy.match, facts)]
        assert found.match(facts) is (fitting[0] if fitting else DEFAULT)


def _fits(match: Match, facts: RequestFacts) -> bool:
    conditions = [
        *([facts.api_key in match.api_key] if match.api_key else []),
        *([facts.path == match.path] if match.path else []),
        *([facts.model == match.model] if match.model else []),
        *(facts.headers.get(name) == value for name, value in match.header.items()),
        *(facts.metadata.get(name) == value for name, value in match.metadata.items()),
        *([facts.now == MONDAY_NOON] if match.hours else []),
    ]
    return bool(conditions) and all(conditions)
