from __future__ import annotations

import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from loadtest.client import Client, Outcome, Target, calibrate
from loadtest.mix import Goals, TrafficClass, single_class
from loadtest.workloads import Planned
from tests.loadtest.standin import Behaviour, serve

NOISE = 0.25  # seconds a busy machine may add to any one measurement


def planned(max_tokens: int = 5, traffic: TrafficClass | None = None) -> Planned:
    return Planned(0, None, traffic or single_class(Goals()).classes[0], "hello", 1, max_tokens)


async def ask(behaviour: Behaviour, request: Planned, **target: Any) -> Outcome:
    with serve(behaviour) as server:
        async with Client(Target(server.url, "m", **target)) as client:
            return await client.send(request)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_it_measures_the_delays_the_server_makes(endpoint: Any) -> None:
    outcome = await ask(Behaviour(ttft=0.2, tpot=0.03), planned(9), endpoint=endpoint)
    assert outcome.status == "ok"
    assert len(outcome.token_times) == outcome.completion_tokens == 9
    assert outcome.ttft is not None
    assert outcome.tpot is not None
    assert 0.2 <= outcome.ttft < 0.2 + NOISE
    assert 0.029 <= outcome.tpot < 0.03 + NOISE / 8
    assert 0.2 + 8 * 0.03 <= outcome.latency < 0.2 + 8 * 0.03 + NOISE
    assert outcome.finish_reason == "length"


async def test_tokens_that_come_bundled_are_not_counted_as_one() -> None:
    outcome = await ask(Behaviour(tpot=0.02, tokens_per_chunk=4), planned(16))
    assert len(outcome.token_times) == 4
    assert outcome.tokens == 16
    # Three gaps of 80 ms over fifteen tokens, not over three.
    assert outcome.tpot is not None
    assert 0.0159 <= outcome.tpot < 0.016 + NOISE / 15


async def test_without_usage_chunks_are_the_tokens() -> None:
    outcome = await ask(Behaviour(usage=False), planned(6))
    assert outcome.completion_tokens is None
    assert outcome.tokens == 6


async def test_one_token_has_no_time_per_output_token() -> None:
    outcome = await ask(Behaviour(), planned(1))
    assert outcome.status == "ok"
    assert outcome.tpot is None


async def test_waiting_before_the_send_counts_for_the_caller_only() -> None:
    with serve(Behaviour(ttft=0.1)) as server:
        async with Client(Target(server.url, "m")) as client:
            outcome = await client.send(planned(2), intended=time.perf_counter() - 5)
    assert outcome.ttft is not None
    assert outcome.ttft_from_sent is not None
    assert outcome.ttft - outcome.ttft_from_sent == pytest.approx(5, abs=NOISE)
    assert 0.1 <= outcome.ttft_from_sent < 0.1 + NOISE
    assert outcome.latency > 5


async def test_what_the_gateway_adds_is_kept() -> None:
    says = {"level": "int8", "predicted": {"ttft_ms": 12}, "slo_met": True}
    outcome = await ask(Behaviour(compression=says), planned())
    assert outcome.compression == says
    assert outcome.level == "int8"


@pytest.mark.parametrize(
    ("code", "status"),
    [(429, "refused"), (503, "refused"), (422, "refused"), (400, "error"), (500, "error")],
)
async def test_refusals_are_told_from_errors(code: int, status: str) -> None:
    outcome = await ask(Behaviour(statuses=[code]), planned())
    assert (outcome.status, outcome.http_status) == (status, code)
    assert outcome.error == f"told to say {code}"
    assert outcome.token_times == []


async def test_a_cut_stream_is_an_error() -> None:
    outcome = await ask(Behaviour(cut_after=2), planned())
    assert outcome.status == "error"
    assert "without a finish_reason" in (outcome.error or "")
    assert len(outcome.token_times) == 2


async def test_an_error_event_is_an_error() -> None:
    outcome = await ask(Behaviour(error_after=3), planned())
    assert (outcome.status, outcome.error) == ("error", "the engine died")


async def test_a_hanging_stream_times_out() -> None:
    outcome = await ask(Behaviour(hang_after=2), planned(), timeout=0.5)
    assert outcome.status == "timeout"
    assert len(outcome.token_times) == 2
    assert 0.5 <= outcome.latency < 0.5 + 2


async def test_the_end_of_the_run_cuts_a_stream_off() -> None:
    with serve(Behaviour(hang_after=2)) as server:
        async with Client(Target(server.url, "m")) as client:
            outcome = await client.send(planned(), end=time.perf_counter() + 0.5)
            over = await client.send(planned(), end=time.perf_counter() - 1)
    assert outcome.status == over.status == "timeout"


async def test_nobody_there_is_an_error() -> None:
    with socket.socket() as held:  # bound, not listening: refuses connections
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        async with Client(Target(url, "m")) as client:
            outcome = await client.send(planned())
    assert outcome.status == "error"
    assert outcome.http_status is None


SLA = {"ttft_ms": 100, "objective": "latency"}


@pytest.mark.parametrize("send_sla", [True, False])
async def test_the_request_carries_what_the_class_says(send_sla: bool) -> None:
    traffic = TrafficClass(name="x", sla=SLA, model="m@int8")
    with serve(Behaviour()) as server:
        target = Target(
            server.url, "m", api_key="secret-key", send_sla=send_sla, body={"temperature": 0}
        )
        async with Client(target) as client:
            await client.send(planned(3, traffic))
    body = server.bodies[0]
    assert body.get("sla") == (SLA if send_sla else None)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m@int8", 3, 0)
    assert server.headers[0]["authorization"] == "Bearer secret-key"
    assert "secret-key" not in repr(target)


async def test_calibration_finds_how_the_server_counts() -> None:
    behaviour = Behaviour(chars_per_token=5, template_tokens=7)
    with serve(behaviour) as server:
        chat = Target(server.url, "m")
        async with Client(chat) as client:
            per_char, overhead = await calibrate(client, chat, ("x" * 100, "x" * 500))
            plain = replace(chat, endpoint="completions")
            assert await calibrate(client, plain, ("x" * 100, "x" * 500)) == (0.2, 0.0)
    assert (per_char, overhead) == (0.2, 7.0)


@pytest.mark.parametrize("behaviour", [Behaviour(usage=False), Behaviour(statuses=[500])])
async def test_calibration_says_when_it_cannot(behaviour: Behaviour) -> None:
    with serve(behaviour) as server:
        target = Target(server.url, "m")
        async with Client(target) as client:
            with pytest.raises(LookupError):
                await calibrate(client, target, ("x" * 100, "x" * 500))
