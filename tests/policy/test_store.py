"""The policy store: matching, validation, persistence, hot reload."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.documents import Documents
from cache.redis import RedisStore
from gateway.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unavailable
from gateway.policy.matching import RequestFacts
from gateway.policy.parse import parse_policy
from gateway.policy.policy import Match, Policy
from gateway.policy.store import MAX_STORED, NAMESPACE, PolicyStore
from tests.support.redis_server import RedisServer

FAST = Policy(name="fast", match=Match(path="/v1/chat/completions"), tpot_ms=5)
GOLD = Policy(name="gold", match=Match(header={"X-Tier": "gold"}, path="/v1/chat/completions"))
TEAM = Policy(name="team", match=Match(api_key=("team-a",)))
MODEL = Policy(name="model", match=Match(model="docs-17m"))
NAMED = Policy(name="named-only", memory_mb=10)
Store = Callable[..., PolicyStore]


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    return Documents(tmp_path)


@pytest.fixture
def store(documents: Documents) -> Store:
    """Makes stores over the same documents, as restarts and replicas are."""
    return lambda *configured: PolicyStore(configured, documents)


def asked(**changes: Any) -> RequestFacts:
    return RequestFacts(
        **{"api_key": None, "path": "/v1/chat/completions", "model": "other", **changes}
    )


@pytest.mark.parametrize(
    ("facts", "named", "expected"),
    [
        pytest.param(asked(), None, "fast", id="path"),
        pytest.param(asked(path="/v1/completions"), None, "default", id="nothing matches"),
        pytest.param(asked(headers={"x-tier": "gold"}), None, "gold", id="two conditions beat one"),
        pytest.param(asked(headers={"x-tier": "silver"}), None, "fast", id="another header value"),
        pytest.param(asked(api_key="team-a"), None, "team", id="a key beats a path"),
        pytest.param(asked(api_key="team-b"), None, "fast", id="another key"),
        pytest.param(
            asked(api_key="team-a", headers={"X-TIER": "gold"}), None, "gold", id="two beat a key"
        ),
        pytest.param(asked(model="docs-17m"), None, "model", id="a model beats a path"),
        pytest.param(asked(api_key="team-b"), "named-only", "named-only", id="named explicitly"),
        pytest.param(asked(api_key="team-a"), "team", "team", id="a bound key names its own"),
        pytest.param(
            asked(path="/v1/completions", headers={"x-tier": "gold"}),
            "named-only",
            "named-only",
            id="headers and paths bind nobody",
        ),
        pytest.param(asked(), "team", "team", id="named, and no keys are in use"),
        pytest.param(asked(), "default", "default", id="default by name"),
    ],
)
def test_match(store: Store, facts: RequestFacts, named: str | None, expected: str) -> None:
    policies = store(FAST, GOLD, TEAM, MODEL, NAMED)
    assert policies.match(facts, named).name == expected


def test_match_does_not_depend_on_the_order_of_configuration(store: Store) -> None:
    one, other = Policy(name="a", match=Match(path="/x")), Policy(name="b", match=Match(path="/x"))
    assert store(one, other).match(asked(path="/x")).name == "a"
    assert store(other, one).match(asked(path="/x")).name == "a"


def test_an_unknown_policy_is_refused_with_the_names_there_are(store: Store) -> None:
    with pytest.raises(NotFound, match="default, fast"):
        store(FAST).match(asked(), "fsat")


def test_a_policy_of_other_keys_cannot_be_taken_by_name(store: Store) -> None:
    with pytest.raises(Forbidden):
        store(TEAM).match(asked(api_key="team-b"), "team")


@pytest.mark.parametrize("named", ["named-only", "fast", "default", "other-team"])
def test_a_bound_key_cannot_escape_by_naming_another_policy(store: Store, named: str) -> None:
    second = Policy(name="second", match=Match(api_key=("team-a", "team-b"), path="/x"))
    others = Policy(name="other-team", match=Match(api_key=("team-b",)))
    policies = store(FAST, TEAM, NAMED, second, others)
    with pytest.raises(Forbidden, match=r"it may name: second, team$"):
        policies.match(asked(api_key="team-a"), named)
    assert policies.match(asked(api_key="team-a"), "second") == second


async def test_a_policy_set_over_http_binds_the_keys_it_lists(store: Store) -> None:
    policies = store(NAMED)
    caller = asked(api_key="team-a")
    assert policies.match(caller, "named-only") == NAMED
    await policies.put(TEAM)
    with pytest.raises(Forbidden, match="team"):
        policies.match(caller, "named-only")
    await policies.delete("team")
    assert policies.match(caller, "named-only") == NAMED


def test_default_always_exists_and_comes_last(store: Store) -> None:
    assert [policy.name for policy in store().list()] == ["default"]
    assert [p.name for p in store(FAST, GOLD, NAMED).list()] == [
        "gold",
        "fast",
        "named-only",
        "default",
    ]
    loose = Policy(name="default", max_ppl_ratio=2.0)
    assert store(loose).get("default").max_ppl_ratio == 2.0


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param({"ttft": 3}, "ttft: unknown; allowed are ttft_ms", id="unknown key"),
        pytest.param(
            {"match": {"key": "x"}}, "match.key: unknown; allowed are api_key", id="match"
        ),
        pytest.param({"ttft_ms": -1}, "ttft_ms: .*greater than 0", id="negative"),
        pytest.param({"ttft_ms": 1e30}, "ttft_ms: .*less than", id="absurd"),
        pytest.param({"tpot_ms": float("nan")}, "tpot_ms", id="NaN"),
        pytest.param({"max_ppl_ratio": 0.5}, "max_ppl_ratio: .*1", id="better than dense"),
        pytest.param({"on_miss": "ignore"}, "on_miss: .*'wait', 'nearest' or 'reject'", id="enum"),
        pytest.param({"objective": "cheap"}, "objective: .*'quality'", id="objective"),
        pytest.param({"levels": "int8"}, "levels", id="not a list"),
        pytest.param({"name": "other"}, "name: must be 'mine'", id="another name"),
        pytest.param(["ttft_ms"], "object", id="not an object"),
    ],
)
def test_a_bad_policy_is_refused_naming_the_field(document: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_policy("mine", document)


@pytest.mark.parametrize("name", ["", "UPPER", "../etc", "a/b", "-a", "a" * 65])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        parse_policy(name, {})


async def test_put_takes_effect_at_once_and_survives_a_restart(store: Store) -> None:
    policies = store()
    await policies.load()
    given = parse_policy("new", {"tpot_ms": 9, "match": {"path": "/x"}})
    await policies.put(given)
    assert policies.match(asked(path="/x")) == given
    restarted = store()
    await restarted.load()
    assert restarted.get("new") == given


async def test_replicas_follow(store: Store) -> None:
    here, there = store(), store()
    await here.load()
    await there.load()
    await here.put(Policy(name="new"))
    assert there.get("new") == Policy(name="new")
    await there.delete("new")
    with pytest.raises(NotFound):
        here.get("new")


async def test_a_configured_policy_can_be_overridden_and_comes_back(store: Store) -> None:
    policies = store(FAST)
    with pytest.raises(Conflict, match="configuration"):
        await policies.delete("fast")
    await policies.put(Policy(name="fast", tpot_ms=50))
    assert policies.get("fast").tpot_ms == 50
    await policies.delete("fast")
    assert policies.get("fast") == FAST


async def test_default_can_be_overridden_but_not_deleted(store: Store) -> None:
    policies = store()
    with pytest.raises(Conflict):
        await policies.delete("default")
    await policies.put(Policy(name="default", objective="latency"))
    assert policies.match(asked()).objective == "latency"
    await policies.delete("default")
    assert policies.match(asked()).objective == "quality"


async def test_deleting_what_is_not_there(store: Store) -> None:
    with pytest.raises(NotFound):
        await store().delete("nobody")


async def test_when_nothing_can_be_stored_nothing_changes(store: Store, tmp_path: Path) -> None:
    policies = store()
    await policies.put(Policy(name="kept", tpot_ms=1))
    shutil.rmtree(tmp_path / "documents")
    (tmp_path / "documents").write_text("a file where the folder should be")
    with pytest.raises(Unavailable, match="cannot be stored") as refused:
        await policies.put(Policy(name="kept", tpot_ms=2))
    assert refused.value.retry_after
    with pytest.raises(Unavailable):
        await policies.delete("kept")
    assert policies.get("kept").tpot_ms == 1


async def test_a_damaged_document_is_left_out(
    store: Store, documents: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    await documents.put(NAMESPACE, "bad", {"ttft_ms": "soon"})
    await documents.put(NAMESPACE, "good", {"tpot_ms": 4})
    policies = store()
    await policies.load()
    assert [policy.name for policy in policies.list()] == ["good", "default"]
    assert "bad" in caplog.text


async def test_the_number_of_policies_is_bounded(store: Store, documents: Documents) -> None:
    for number in range(MAX_STORED):
        await documents.put(NAMESPACE, f"p{number}", {})
    policies = store()
    await policies.load()
    with pytest.raises(Conflict):
        await policies.put(Policy(name="one-more"))
    await policies.put(Policy(name="p0", tpot_ms=3))


async def test_a_reader_keeps_the_policy_it_has(store: Store) -> None:
    policies = store(FAST)
    mine = policies.match(asked())
    await policies.put(Policy(name="fast", tpot_ms=50))
    assert mine.tpot_ms == 5


async def eventually(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("not within ten seconds")


async def test_a_policy_set_on_one_replica_reaches_another_through_redis(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    links = [RedisStore(redis_server.url, budget=2**20, ttl=60, variant_limit=1) for _ in "ab"]
    homes = [Documents(tmp_path / str(i), link) for i, link in enumerate(links)]
    here, there = (PolicyStore((FAST,), documents) for documents in homes)
    try:
        await here.load()
        await there.load()
        await here.put(Policy(name="fast", tpot_ms=50))
        await eventually(lambda: there.get("fast").tpot_ms == 50)
        await there.delete("fast")
        await eventually(lambda: here.get("fast") == FAST)
    finally:
        for documents, link in zip(homes, links, strict=True):
            await documents.close()
            await link.close()
