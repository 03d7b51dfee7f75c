"""Admission: bounds are kept and every permit comes back, however its holder leaves."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Limits
from gateway.errors import Overloaded
from gateway.policy.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(total: int = 4, per_key: int = 2, clock: Clock | None = None) -> Admission:
    limits = Limits(max_concurrent=total, max_concurrent_per_key=per_key)
    return Admission(limits, clock or Clock())


def test_the_key_limit_and_the_house_limit() -> None:
    house = admission(total=3, per_key=2)
    with ExitStack() as held:
        held.enter_context(house.admit("a"))
        held.enter_context(house.admit("a"))
        with pytest.raises(Overloaded, match="this API key has 2"):
            held.enter_context(house.admit("a"))
        held.enter_context(house.admit(None))
        with pytest.raises(Overloaded, match="the gateway serves 3"):
            held.enter_context(house.admit("b"))
        assert (house.in_flight, house.held_by("a"), house.held_by(None)) == (3, 2, 1)
    assert (house.in_flight, house.keys) == (0, 0)
    assert (house.admitted, house.refused) == (3, 2)


def test_a_permit_not_entered_takes_nothing() -> None:
    house = admission()
    house.admit("a")
    assert house.in_flight == 0


def test_a_permit_is_held_once_and_given_back_once() -> None:
    house = admission()
    permit = house.admit("a")
    with permit, pytest.raises(RuntimeError), permit:
        pass
    permit.__exit__(None, None, None)
    assert house.in_flight == 0


def test_retry_after_follows_the_observed_rate() -> None:
    """Stays of 40 s, two at once: a place every 20 s."""
    clock = Clock()
    house = admission(total=2, clock=clock)
    for _ in range(3):
        with house.admit("a"):
            clock.now += 40
    with house.admit("a"), house.admit("b"), pytest.raises(Overloaded) as refused:
        house.admit("c").__enter__()
    assert refused.value.retry_after == pytest.approx(20)
    assert refused.value.headers() == {"retry-after": "20"}


def test_retry_after_is_bounded_before_anything_was_observed() -> None:
    house = admission(total=1)
    with house.admit("a"), pytest.raises(Overloaded) as refused:
        house.admit("b").__enter__()
    assert refused.value.retry_after == 1


async def test_cancelled_failed_and_finished_requests_all_leave() -> None:
    house = admission(total=100, per_key=100)

    async def request(number: int) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(house.admit(f"key-{number % 7}"))
            if number % 3 == 0:
                await asyncio.sleep(3600)
            await asyncio.sleep(0)
            if number % 3 == 1:
                raise ValueError("broken")

    tasks = [asyncio.create_task(request(number)) for number in range(90)]
    await asyncio.sleep(0.01)
    assert house.in_flight == 30
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (house.in_flight, house.keys) == (0, 0)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.booleans()), max_size=60))
def test_it_agrees_with_a_plain_list_of_who_is_in(steps: list[tuple[bool, str, bool]]) -> None:
    house = admission(total=4, per_key=2)
    inside: list[tuple[str, ExitStack]] = []
    for enters, key, fails in steps:
        if enters:
            stack = ExitStack()
            free = len(inside) < 4 and sum(name == key for name, _ in inside) < 2
            try:
                stack.enter_context(house.admit(key))
            except Overloaded:
                assert not free
            else:
                assert free
                inside.append((key, stack))
        elif inside:
            _, stack = inside.pop(0)
            error = ValueError("broken") if fails else None
            stack.__exit__(type(error) if error else None, error, None)
        assert house.in_flight == len(inside)
        assert house.keys == len({name for name, _ in inside})
        assert house.held_by("a") == sum(name == "a" for name, _ in inside)
