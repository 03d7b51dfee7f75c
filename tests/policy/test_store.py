"""The policy store: matching, validation, persistence, hot reload."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cache.documents import Documents
from cache.redis import RedisStore
from gateway.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unavailable
from gateway.policy import rollout
from gateway.policy.canary import Counts, Plan, Tally
from gateway.policy.matching import RequestFacts
from gateway.policy.parse import parse_policy
from gateway.policy.policy import Match, Policy
from gateway.policy.store import MAX_STORED, NAMESPACE, PolicyStore
from gateway.policy.versions import By
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


# -- versions -------------------------------------------------------------------------------------


async def test_versions_survive_a_restart_and_a_deletion(store: Store) -> None:
    policies = store()
    await policies.load()
    await policies.put(Policy(name="new", tpot_ms=1), By(author="me", comment="why"))
    await policies.put(Policy(name="new", tpot_ms=2))
    await policies.delete("new")
    restarted = store()
    await restarted.load()
    history = restarted.history("new")
    assert [(v.version, v.kind, v.author, v.comment) for v in history.versions] == [
        (1, "put", "me", "why"),
        (2, "put", "local", None),
        (3, "delete", "local", None),
    ]
    await restarted.rollback("new", 1)
    assert restarted.get("new").tpot_ms == 1
    with pytest.raises(NotFound, match="version 9"):
        await restarted.rollback("new", 9)


async def test_an_explicit_default_survives_a_restart(store: Store) -> None:
    """What a child writes replaces its parent's even when it is what a policy has by default."""
    base = Policy(name="base", ttft_ms=5, objective="latency")
    policies = store(base)
    await policies.put(Policy(name="child", extends="base", ttft_ms=None, objective="quality"))
    restarted = store(base)
    await restarted.load()
    child = restarted.get("child")
    assert (child.ttft_ms, child.objective) == (None, "quality")


async def test_children_follow_their_parent_and_its_override(store: Store) -> None:
    policies = store(Policy(name="base", ttft_ms=5), Policy(name="child", extends="base"))
    assert policies.get("child").ttft_ms == 5
    await policies.put(Policy(name="base", ttft_ms=7))
    assert policies.get("child").ttft_ms == 7
    await policies.delete("base")
    assert policies.get("child").ttft_ms == 5


async def test_broken_chains_are_refused(store: Store) -> None:
    policies = store()
    await policies.put(Policy(name="parent", ttft_ms=7))
    await policies.put(Policy(name="child", extends="parent"))
    with pytest.raises(InvalidRequest, match="extends: no policy 'nobody'"):
        await policies.put(Policy(name="other", extends="nobody"))
    with pytest.raises(InvalidRequest, match="parent → child → parent"):
        await policies.put(Policy(name="parent", extends="child"))
    with pytest.raises(Conflict, match="extended by child"):
        await policies.delete("parent")
    assert policies.get("child").ttft_ms == 7


async def test_a_child_whose_parent_vanished_keeps_its_own(
    store: Store, documents: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    """Two replicas may delete the parent and write the child at once."""
    await documents.put(NAMESPACE, "child", {"extends": "gone", "ttft_ms": 3})
    policies = store()
    await policies.load()
    assert policies.get("child").ttft_ms == 3
    assert "no policy 'gone'" in caplog.text


async def test_writers_on_one_disk_lose_no_version(documents: Documents, tmp_path: Path) -> None:
    """Two processes without Redis: each reads what the other wrote before it writes."""
    writers = [PolicyStore((), Documents(tmp_path)) for _ in range(4)]
    await asyncio.gather(
        *(
            writer.put(Policy(name="p", tpot_ms=1 + number))
            for writer in writers
            for number in range(5)
        )
    )
    reader = PolicyStore((), documents)
    await reader.load()
    assert [v.version for v in reader.history("p").versions] == list(range(1, 21))


async def test_deleted_policies_make_room(store: Store, documents: Documents) -> None:
    for number in range(MAX_STORED):
        await documents.put(NAMESPACE, f"p{number}", {})
    policies = store()
    await policies.load()
    await policies.delete("p7")
    await policies.put(Policy(name="one-more"))
    assert policies.get("one-more")
    with pytest.raises(NotFound):
        policies.history("p7")


def test_a_policy_has_a_bounded_size() -> None:
    keys = [f"{number:03d}" + "\x01" * 253 for number in range(256)]
    with pytest.raises(InvalidRequest, match="at most"):
        parse_policy("p", {"match": {"api_key": keys}})


# -- candidates -----------------------------------------------------------------------------------


def outcomes(policies: PolicyStore, arm: str, met: int, missed: int) -> None:
    split = policies.split("p")
    assert split is not None
    policy = split.canary if arm == "canary" else split.stable
    for number in range(met + missed):
        policies.observe(policy, met=number < met)


async def test_a_candidate_gets_its_share_and_nobody_elses(store: Store) -> None:
    policies = store(Policy(name="p", ttft_ms=5))
    await policies.start_canary(Policy(name="p", ttft_ms=3), Plan(percent=25))
    got = [policies.match(asked(user=str(i)), "p").ttft_ms for i in range(400)]
    assert 60 < got.count(3) < 140
    assert got == [policies.match(asked(user=str(i)), "p").ttft_ms for i in range(400)]
    assert policies.get("p").ttft_ms == 5
    await policies.abort("p")
    assert {policies.match(asked(user=str(i)), "p").ttft_ms for i in range(400)} == {5}


async def test_counts_survive_a_restart_and_end_the_candidate(store: Store) -> None:
    base = Policy(name="p", ttft_ms=5)
    policies = store(base)
    await policies.load()
    await policies.start_canary(Policy(name="p", ttft_ms=3), Plan(min_requests=30))
    outcomes(policies, "stable", 300, 0)
    outcomes(policies, "canary", 5, 15)
    await policies.close()
    restarted = store(base)
    await restarted.load()
    assert restarted.rollouts.counts("p") == Counts(Tally(300, 300), Tally(20, 5))
    assert restarted.split("p") is not None
    outcomes(restarted, "canary", 2, 13)
    await restarted.rollouts.share()
    assert restarted.split("p") is None
    last = restarted.history("p").versions[-1]
    assert (last.kind, last.author, last.of) == ("fallback", "pressgate", 1)
    assert last.comment == "attainment 20.0% of 35 requests against 100.0% of 300"
    assert restarted.get("p") == base


async def test_nothing_is_counted_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often and from wherever outcomes are shared, and when the end comes meanwhile."""
    monkeypatch.setattr(rollout, "SHARE_SECONDS", 0.0)
    base = Policy(name="p", ttft_ms=5)
    policies = store(base)
    await policies.load()
    await policies.start_canary(Policy(name="p", ttft_ms=3), Plan())
    for _ in range(10):
        outcomes(policies, "stable", 3, 1)
        outcomes(policies, "canary", 4, 0)
        await asyncio.gather(*(policies.rollouts.share() for _ in range(3)))
        outcomes(policies, "stable", 1, 0)
        await asyncio.sleep(0)
    outcomes(policies, "canary", 1, 0)
    await asyncio.sleep(0.001)
    await policies.close()
    restarted = store(base)
    await restarted.load()
    assert restarted.rollouts.counts("p") == Counts(Tally(50, 40), Tally(41, 41))


async def test_what_comes_in_while_others_are_shared_is_shared_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "SHARE_SECONDS", 0.001)
    here, there = store(Policy(name="p", ttft_ms=5)), store(Policy(name="p", ttft_ms=5))
    await here.load()
    await there.load()
    await here.start_canary(Policy(name="p", ttft_ms=3), Plan())
    for _ in range(200):
        outcomes(here, "stable", 1, 0)
        await asyncio.sleep(0)
    await eventually(lambda: there.rollouts.counts("p").stable == Tally(200, 200))


async def test_a_new_candidate_is_counted_anew(store: Store) -> None:
    policies = store(Policy(name="p", ttft_ms=5))
    await policies.load()
    await policies.start_canary(Policy(name="p", ttft_ms=3), Plan())
    outcomes(policies, "canary", 0, 20)
    await policies.rollouts.share()
    await policies.start_canary(Policy(name="p", ttft_ms=4), Plan())
    assert policies.rollouts.counts("p") == Counts()
    outcomes(policies, "canary", 3, 0)
    await policies.rollouts.share()
    assert policies.rollouts.counts("p").canary == Tally(3, 3)


async def test_other_changes_do_not_disturb_a_candidate(store: Store) -> None:
    """Requests under way are still counted, and a parent's change reaches both arms."""
    policies = store(Policy(name="base", tpot_ms=9), Policy(name="p", extends="base", ttft_ms=5))
    await policies.load()
    await policies.start_canary(Policy(name="p", extends="base", ttft_ms=3), Plan(percent=50))
    before = policies.split("p")
    await policies.put(Policy(name="unrelated"))
    assert before is not None
    policies.observe(before.canary, met=True)
    assert policies.rollouts.counts("p").canary == Tally(1, 1)
    await policies.put(Policy(name="base", tpot_ms=7))
    after = policies.split("p")
    assert after is not None
    assert (after.stable.tpot_ms, after.canary.tpot_ms, after.canary.ttft_ms) == (7, 7, 3)
    await policies.promote("p")
    assert policies.get("p").ttft_ms == 3


async def test_a_candidate_needs_a_policy_with_the_same_match(store: Store) -> None:
    policies = store(FAST)
    with pytest.raises(NotFound):
        await policies.start_canary(Policy(name="nobody"), Plan())
    with pytest.raises(InvalidRequest, match="match: must be as in 'fast'"):
        await policies.start_canary(Policy(name="fast", tpot_ms=3), Plan())
    with pytest.raises(Conflict, match="no candidate"):
        await policies.promote("fast")


async def test_a_candidate_goes_on_while_nothing_can_be_stored(
    store: Store, tmp_path: Path
) -> None:
    policies = store(Policy(name="p", ttft_ms=5))
    await policies.load()
    await policies.start_canary(Policy(name="p", ttft_ms=3), Plan(min_requests=10))
    kept = (tmp_path / "documents").rename(tmp_path / "elsewhere")
    (tmp_path / "documents").write_text("a file where the folder should be")
    outcomes(policies, "stable", 100, 0)
    outcomes(policies, "canary", 0, 40)
    await policies.rollouts.share()
    assert policies.split("p") is not None
    (tmp_path / "documents").unlink()
    kept.rename(tmp_path / "documents")
    await policies.rollouts.share()
    assert policies.split("p") is None
    assert policies.history("p").versions[-1].kind == "fallback"


# -- replicas -------------------------------------------------------------------------------------


async def eventually(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("not within ten seconds")


@pytest.fixture
async def replicas(
    redis_server: RedisServer, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[list[PolicyStore]]]]:
    """Makes three stores, each with a disk of its own, on one Redis."""
    links = [
        RedisStore(redis_server.url, budget=2**20, ttl=60, variant_limit=1, timeout=30)
        for _ in range(3)
    ]
    homes = [Documents(tmp_path / str(i), link) for i, link in enumerate(links)]

    async def make(*configured: Policy) -> list[PolicyStore]:
        stores = [PolicyStore(configured, documents) for documents in homes]
        for one in stores:
            await one.load()
        return stores

    yield make
    for documents, link in zip(homes, links, strict=True):
        await documents.close()
        await link.close()


async def test_writers_on_three_replicas_lose_no_version(replicas: Any) -> None:
    stores = await replicas()
    await asyncio.gather(
        *(
            one.put(Policy(name="p", tpot_ms=10 * index + number + 1), By(author=f"r{index}"))
            for index, one in enumerate(stores)
            for number in range(8)
        )
    )
    await eventually(lambda: all(one.history("p").last == 24 for one in stores))
    first = stores[0].history("p")
    assert [v.version for v in first.versions] == list(range(1, 25))
    assert all(one.history("p") == first for one in stores)
    written_ = {v.document["tpot_ms"] for v in first.versions if v.document is not None}
    assert written_ == {10 * i + n + 1 for i in range(3) for n in range(8)}
    assert {one.get("p").tpot_ms for one in stores} == {first.versions[-1].document["tpot_ms"]}


async def test_replicas_judge_a_candidate_by_all_their_outcomes(replicas: Any) -> None:
    one, two, three = stores = await replicas(Policy(name="p", ttft_ms=5))
    await one.start_canary(Policy(name="p", ttft_ms=3), Plan(min_requests=30, max_drop=0.05))
    await eventually(lambda: all(store.split("p") is not None for store in stores))
    for store in stores:
        outcomes(store, "stable", 100, 0)
        outcomes(store, "canary", 3, 9)
    await asyncio.gather(one.rollouts.share(), two.rollouts.share())
    assert three.split("p") is not None, "24 of 30"
    await three.rollouts.share()
    await eventually(lambda: all(store.split("p") is None for store in stores))
    kinds = [v.kind for v in one.history("p").versions]
    assert kinds == ["configured", "canary", "fallback"]
    assert two.rollouts.counts("p") == Counts()


async def test_versions_made_while_cut_off_are_not_lost(
    replicas: Any, redis_server: RedisServer
) -> None:
    one, two, _ = stores = await replicas()
    await one.put(Policy(name="p", tpot_ms=1))
    await eventually(lambda: all(len(store.list()) == 2 for store in stores))
    redis_server.kill()
    await one.put(Policy(name="p", tpot_ms=10), By(author="one"))
    await two.put(Policy(name="p", tpot_ms=20), By(author="two"))
    await two.put(Policy(name="p", tpot_ms=30), By(author="two"))
    redis_server.start()

    def settled() -> bool:
        histories = [store.history("p") for store in (one, two)]
        made = {v.document["tpot_ms"] for v in histories[0].versions}
        return histories[0] == histories[1] and made == {1, 10, 20, 30}

    await eventually(settled)
    assert one.get("p") == two.get("p")
    assert [v.kind for v in one.history("p").versions].count("apart") >= 1


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
