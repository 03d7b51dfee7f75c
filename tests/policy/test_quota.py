"""Quotas: sliding windows that let no burst through twice, in memory and in Redis alike."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Quota
from gateway.errors import Overloaded
from gateway.policy.quota import (
    MINUTE,
    Allowance,
    Counters,
    MemoryCounters,
    Quotas,
    RedisCounters,
    Use,
)
from tests.support.redis_server import RedisServer, redis_binary

START = 1_800_000_000.0  # the beginning of a minute
assert START % MINUTE == 0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    if redis_binary() is None:
        pytest.skip("no redis-server")
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
async def counters(request: pytest.FixtureRequest) -> AsyncIterator[Counters]:
    if request.param == "memory":
        yield MemoryCounters()
        return
    client = redis.asyncio.Redis.from_url(request.getfixturevalue("server").url)
    await client.flushall()
    yield RedisCounters(client)
    await client.aclose()


def quotas(counters: Counters, clock: Clock, **limits: int) -> Quotas:
    return Quotas({"team": Quota(**limits)}, counters, clock=clock)


async def test_requests_per_minute(counters: Counters) -> None:
    clock = Clock()
    house = quotas(counters, clock, requests_per_minute=3)
    left = []
    for _ in range(3):
        taken = await house.take("team", 10)
        assert taken is not None
        left.append(taken.headers["x-ratelimit-remaining-requests"])
    assert left == ["2", "1", "0"]
    with pytest.raises(Overloaded, match="3 requests per minute") as refused:
        await house.take("team", 10)
    assert refused.value.status == 429
    assert refused.value.error_code == "rate_limit_exceeded"
    headers = refused.value.headers()
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "2m0s"
    # A third of the next minute must pass before the three of this one count as two.
    assert refused.value.retry_after == pytest.approx(80)
    clock.now += 79
    with pytest.raises(Overloaded):
        await house.take("team", 10)
    clock.now += 1
    assert await house.take("team", 10) is not None


async def test_nobody_else_is_bound(counters: Counters) -> None:
    house = quotas(counters, Clock(), requests_per_minute=1)
    assert await house.take(None, 10) is None
    assert await house.take("other", 10) is None


async def test_tokens_not_used_are_given_back(counters: Counters) -> None:
    house = quotas(counters, Clock(), tokens_per_minute=1000)
    taken = await house.take("team", 900)
    assert taken is not None
    with pytest.raises(Overloaded, match="1000 tokens per minute"):
        await house.take("team", 200)
    await house.settle(taken, 100)
    after = await house.take("team", 200)
    assert after is not None
    assert after.headers["x-ratelimit-remaining-tokens"] == "700"


async def test_a_refusal_takes_nothing(counters: Counters) -> None:
    """Ten requests are allowed, but the tokens of only one."""
    house = quotas(counters, Clock(), requests_per_minute=10, tokens_per_day=1000)
    await house.take("team", 900)
    for _ in range(20):
        with pytest.raises(Overloaded, match="1000 tokens per day"):
            await house.take("team", 900)
    taken = await house.take("team", 50)
    assert taken is not None
    assert taken.headers["x-ratelimit-remaining-requests"] == "8"
    assert taken.headers["x-ratelimit-remaining-tokens"] == "50"


async def test_what_never_fits_has_no_date(counters: Counters) -> None:
    house = quotas(counters, Clock(), tokens_per_minute=1000)
    with pytest.raises(Overloaded, match="lower max_tokens") as refused:
        await house.take("team", 1001)
    assert refused.value.retry_after is None


async def test_what_is_given_back_late_is_given_back_where_it_was_taken(
    counters: Counters,
) -> None:
    clock = Clock()
    house = quotas(counters, clock, tokens_per_minute=1000)
    taken = await house.take("team", 1000)
    assert taken is not None
    clock.now += MINUTE
    with pytest.raises(Overloaded):
        await house.take("team", 500)
    await house.settle(taken, 0)
    assert await house.take("team", 1000) is not None


async def test_without_redis_every_replica_counts_for_itself() -> None:
    client = redis.asyncio.Redis.from_url("unix:///nowhere.sock", socket_connect_timeout=0.05)
    house = quotas(RedisCounters(client), Clock(), requests_per_minute=2)
    for _ in range(2):
        assert await house.take("team", 1) is not None
    with pytest.raises(Overloaded):
        await house.take("team", 1)
    await client.aclose()


async def test_memory_and_redis_count_alike(server: RedisServer) -> None:
    client = redis.asyncio.Redis.from_url(server.url)
    await client.flushall()
    here, there, rng = MemoryCounters(), RedisCounters(client), random.Random(1)
    allowances = (
        Allowance("k", "requests_per_minute", "requests", 60, 7),
        Allowance("k", "tokens_per_day", "tokens", 86_400, 3000),
    )
    now, answers = START, []
    for _ in range(120):
        now += rng.expovariate(1 / 8)
        wants = [(allowances[0], 1), (allowances[1], rng.randrange(1, 60))]
        one, other = await here.take(wants, now), await there.take(wants, now)
        assert one == other
        answers.append(one[0])
        if one[0] and rng.random() < 0.3:
            back = [(allowances[1], 1)]
            await here.give_back(back, now)
            await there.give_back(back, now)
    assert 10 < sum(answers) < 110
    await client.aclose()


@settings(max_examples=100)
@given(
    before=st.integers(0, 50),
    count=st.integers(0, 50),
    into=st.floats(0, 59.9),
    cost=st.integers(1, 60),
    most=st.integers(1, 50),
)
def test_the_date_of_a_retry_is_the_first_that_works(
    before: int, count: int, into: float, cost: int, most: int
) -> None:
    wait = Use(before, count, into).fits_in(cost, most, MINUTE)
    if cost > most:
        assert wait is None
        return
    assert wait is not None

    def used(after: float) -> float:
        at = into + after
        if at < MINUTE:
            return Use(before, count, at).now(MINUTE)
        return Use(count, 0, at - MINUTE).now(MINUTE) if at < 2 * MINUTE else 0.0

    assert used(wait + 1e-6) + cost <= most + 1e-3
    if wait > 1e-3:
        assert used(wait - 1e-3) + cost > most


@settings(max_examples=60)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=60), st.integers(1, 10))
async def test_no_minute_lets_more_than_the_quota_through(gaps: list[float], most: int) -> None:
    """Never more than the quota in a minute of the clock, nor twice as much in any 60 s."""
    clock, counters = Clock(), MemoryCounters()
    house = quotas(counters, clock, requests_per_minute=most)
    let = []
    for gap in gaps:
        clock.now += gap
        try:
            await house.take("team", 1)
        except Overloaded:
            continue
        let.append(clock.now)
    for start in let:
        assert sum(start <= at < start + MINUTE for at in let) <= 2 * most
    windows: dict[int, int] = {}
    for at in let:
        windows[int(at // MINUTE)] = windows.get(int(at // MINUTE), 0) + 1
    assert max(windows.values()) <= most
