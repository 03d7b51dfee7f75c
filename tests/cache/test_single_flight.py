"""Single flight: one build in one process, on one host, over all replicas, in all trouble."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from cache.errors import ClaimLost
from cache.lock import Claim, Locks
from cache.single_flight import SingleFlight
from tests.cache.samples import redis_store, until
from tests.support.redis_server import RedisServer


class Bench:
    """A place where results appear, and a count of who worked."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.result: str | None = None
        self.gate = asyncio.Event()
        self.claims: list[Claim] = []

    async def done(self) -> str | None:
        return self.result

    def work(self, name: str) -> Callable[[Claim], Awaitable[str]]:
        async def make(claim: Claim) -> str:
            self.claims.append(claim)
            self.built.append(name)
            await self.gate.wait()
            await claim.check()
            self.result = name
            return name

        return make


Flights = Callable[..., SingleFlight]


@pytest.fixture
async def flights(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Flights]:
    """Makes replicas: each with a Redis connection of its own and, by default, another host."""
    made: list[tuple[SingleFlight, object]] = []

    def make(host: str, *, ttl: float = 15.0) -> SingleFlight:
        redis = redis_store(redis_server.url, timeout=0.3)
        made.append((SingleFlight(redis, tmp_path / host, ttl=ttl), redis))
        return made[-1][0]

    yield make
    for flight, redis in made:
        await flight.close()
        await redis.close()  # type: ignore[attr-defined]


async def test_callers_in_one_process_join() -> None:
    flight, bench = SingleFlight(None), Bench()
    callers = [asyncio.create_task(flight.run("k", bench.work("w"), bench.done)) for _ in range(50)]
    await until(lambda: bench.built == ["w"])
    assert flight.running() == ["k"]
    bench.gate.set()
    assert await asyncio.gather(*callers) == ["w"] * 50
    assert bench.built == ["w"]
    assert flight.running() == []
    assert await flight.run("k", bench.work("again"), bench.done) == "w"
    assert bench.built == ["w"], "what is there is not built again"


async def test_different_keys_do_not_wait_for_each_other() -> None:
    flight, slow, quick = SingleFlight(None), Bench(), Bench()
    waiting = asyncio.create_task(flight.run("slow", slow.work("s"), slow.done))
    quick.gate.set()
    assert await flight.run("quick", quick.work("q"), quick.done) == "q"
    assert not waiting.done()
    slow.gate.set()
    assert await waiting == "s"


async def test_leaving_callers_do_not_stop_the_work() -> None:
    flight, bench = SingleFlight(None), Bench()
    callers = [asyncio.create_task(flight.run("k", bench.work("w"), bench.done)) for _ in range(3)]
    await until(lambda: bench.built == ["w"])
    callers[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await callers[0]
    assert not callers[1].done()
    for caller in callers[1:]:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert flight.running() == ["k"]
    bench.gate.set()
    await until(lambda: bench.result == "w")


async def test_a_failure_reaches_everyone_and_the_next_call_tries_again() -> None:
    flight, bench = SingleFlight(None), Bench()

    async def fail(_claim: Claim) -> str:
        await asyncio.sleep(0.01)
        raise ValueError("no")

    results = await asyncio.gather(
        *[flight.run("k", fail, bench.done) for _ in range(3)], return_exceptions=True
    )
    assert [type(r) for r in results] == [ValueError] * 3
    bench.gate.set()
    assert await flight.run("k", bench.work("w"), bench.done) == "w"


@pytest.mark.parametrize("hosts", [("a", "b"), ("a", "a")], ids=["two hosts", "one host"])
async def test_one_replica_builds_and_the_others_get_it(
    flights: Flights, hosts: tuple[str, str]
) -> None:
    one, two, bench = flights(hosts[0]), flights(hosts[1]), Bench()
    first = asyncio.create_task(one.run("k", bench.work("one"), bench.done))
    await until(lambda: bench.built == ["one"])
    second = asyncio.create_task(two.run("k", bench.work("two"), bench.done))
    await asyncio.sleep(0.3)
    bench.gate.set()
    assert await asyncio.gather(first, second) == ["one", "one"]
    assert bench.built == ["one"]


async def test_a_waiter_takes_over_when_the_leader_fails(flights: Flights) -> None:
    one, two, bench = flights("a"), flights("b"), Bench()

    async def fail(claim: Claim) -> str:
        bench.claims.append(claim)
        await bench.gate.wait()
        raise ValueError("no")

    first = asyncio.create_task(one.run("k", fail, bench.done))
    await until(lambda: len(bench.claims) == 1)
    second = asyncio.create_task(two.run("k", bench.work("two"), bench.done))
    await asyncio.sleep(0.1)
    bench.gate.set()
    with pytest.raises(ValueError, match="no"):
        await first
    assert await second == "two"
    assert bench.claims[1].token > bench.claims[0].token


async def test_heartbeats_keep_the_lock_and_death_frees_it(
    flights: Flights, redis_server: RedisServer
) -> None:
    one, two, bench = flights("a", ttl=0.6), flights("b", ttl=0.6), Bench()
    first = asyncio.create_task(one.run("k", bench.work("one"), bench.done))
    await until(lambda: bench.built == ["one"])
    second = asyncio.create_task(two.run("k", bench.work("two"), bench.done))
    await asyncio.sleep(1.5)
    assert bench.built == ["one"], "the lock outlived its time to live"
    bench.claims[0]._heart.cancel()  # the leader's process is as good as dead
    await until(lambda: bench.built == ["one", "two"])
    assert not bench.claims[0].still_valid()
    assert not await bench.claims[0].confirm()
    assert bench.claims[1].token > bench.claims[0].token
    bench.gate.set()
    assert await asyncio.gather(first, second) == ["two", "two"], "the old one published nothing"
    with redis_server.client() as client:
        assert list(client.scan_iter("*lock*")) == []


async def test_a_lost_lock_is_noticed_by_the_heartbeat(
    flights: Flights, redis_server: RedisServer
) -> None:
    one, bench = flights("a", ttl=0.6), Bench()
    first = asyncio.create_task(one.run("k", bench.work("one"), bench.done))
    await until(lambda: bench.built == ["one"])
    with redis_server.client() as client:
        name = next(client.scan_iter("*lock*"))
        client.set(name, f"{bench.claims[0].token + 1}:someone-else")
        await until(lambda: not bench.claims[0].still_valid())
        with pytest.raises(ClaimLost):
            await bench.claims[0].check()
        bench.gate.set()
        await asyncio.sleep(0.2)
        assert client.get(name) == f"{bench.claims[0].token + 1}:someone-else".encode()
    assert bench.result is None
    bench.result = "someone else's"
    assert await first == "someone else's"


async def test_the_result_of_a_deposed_leader_is_dropped(
    flights: Flights, redis_server: RedisServer
) -> None:
    """Also when its work forgot to ask."""
    one, bench = flights("a"), Bench()

    async def careless(claim: Claim) -> str:
        with redis_server.client() as client:
            client.set(next(client.scan_iter("*lock*")), f"{claim.token + 1}:someone-else")
        bench.result = "someone else's"
        return "mine"

    assert await one.run("k", careless, bench.done) == "someone else's"


async def test_redis_lost_and_back_empty_keeps_the_leader(
    flights: Flights, redis_server: RedisServer
) -> None:
    one, two, bench = flights("a", ttl=0.6), flights("b", ttl=0.6), Bench()
    first = asyncio.create_task(one.run("k", bench.work("one"), bench.done))
    await until(lambda: bench.built == ["one"])
    redis_server.kill()
    await asyncio.sleep(1.0)
    assert await bench.claims[0].confirm(), "without Redis the host's lock decides"
    redis_server.start()
    with redis_server.client() as client:
        await until(lambda: any(True for _ in client.scan_iter("*lock*")))
    second = asyncio.create_task(two.run("k", bench.work("two"), bench.done))
    await asyncio.sleep(0.3)
    bench.gate.set()
    assert await asyncio.gather(first, second) == ["one", "one"]
    assert bench.built == ["one"]


async def test_tokens_grow_over_a_redis_that_lost_everything(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    redis = redis_store(redis_server.url)
    locks = Locks(redis, tmp_path, 15.0)
    tokens = []
    for turn in range(6):
        claim = await locks.claim("k")
        assert claim is not None
        assert await locks.claim("k") is None
        tokens.append(claim.token)
        await claim.release()
        await claim.release()
        assert not claim.still_valid()
        if turn == 2:
            redis_server.restart()
            await redis.start()
            await until(lambda: redis.up)
        elif turn == 4:
            redis_server.kill()
    assert tokens == sorted(set(tokens))
    await redis.close()


async def test_an_answer_lost_on_the_way_does_not_lock_us_out(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Redis did take the lock, but its answer came too late."""
    redis = redis_store(redis_server.url, timeout=0.2)
    locks = Locks(redis, tmp_path, 15.0)
    await redis.start()
    redis_server.freeze()
    claim = await locks.claim("k")
    assert claim is not None
    redis_server.thaw()
    await until(lambda: redis.up)
    with redis_server.client() as client:
        await until(lambda: any(True for _ in client.scan_iter("*lock*")))
        assert await claim.confirm()
        assert client.get(next(client.scan_iter("*lock*"))) == claim.value.encode()
        await claim.release()
        assert list(client.scan_iter("*lock*")) == []
    await redis.close()


async def test_a_process_that_stood_still_asks_before_it_goes_on(tmp_path: Path) -> None:
    with RedisServer() as server:
        redis = redis_store(server.url)
        claim = await Locks(redis, tmp_path, 0.3).claim("k")
        assert claim is not None
        time.sleep(0.5)  # noqa: ASYNC251 - the whole process stands still, heartbeats too
        assert not claim.still_valid()
        assert await claim.confirm(), "nobody came meanwhile"
        assert claim.still_valid()
        await claim.release()
        await redis.close()


async def test_without_redis_and_folder_a_claim_never_expires() -> None:
    claim = await Locks(None, None, 0.0).claim("k")
    assert claim is not None
    assert claim.still_valid()
    assert await claim.confirm()
    await claim.release()


def test_two_gateways_on_one_disk_build_once(tmp_path: Path) -> None:
    code = """
    import asyncio, os, sys
    from pathlib import Path
    from cache.single_flight import SingleFlight

    root = Path(sys.argv[1])
    result = root / "result"

    async def work(claim):
        with (root / "log").open("a") as log:
            log.write(f"{os.getpid()}\\n")
        await asyncio.sleep(0.5)
        assert claim.still_valid()
        result.write_text(str(os.getpid()))
        return result.read_text()

    async def done():
        return result.read_text() if result.exists() else None

    print(asyncio.run(SingleFlight(None, root).run("k", work, done)))
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    outputs = {child.communicate(timeout=60)[0].strip() for child in children}
    assert len(outputs) == 1
    assert (tmp_path / "log").read_text().split() == list(outputs)


async def test_closing_gives_the_lock_back(flights: Flights, redis_server: RedisServer) -> None:
    one, two, bench = flights("a"), flights("a"), Bench()
    first = asyncio.create_task(one.run("k", bench.work("one"), bench.done))
    await until(lambda: bench.built == ["one"])
    await one.close()
    with pytest.raises(asyncio.CancelledError):
        await first
    with redis_server.client() as client:
        assert list(client.scan_iter("*lock*")) == []
    bench.gate.set()
    assert await two.run("k", bench.work("two"), bench.done) == "two"
