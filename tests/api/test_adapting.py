"""Answers that go on at another level, over HTTP, with a stand-in whose levels can be slowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from gateway.config import FakeModel
from gateway.engine.fake import FakeEngine, FakeSpeed
from gateway.policy.policy import Policy
from tests.support.fake_pool import MODEL, Gateway, make_settings
from tests.support.live import LiveServer

TEXT = "/v1/completions"
TOKENS = 90
RULES = {"tpot_ms": 12.0, "build": False, "confidence": 0.5}


@pytest.fixture
def live() -> Iterator[tuple[Gateway, httpx.Client]]:
    """bf16 and int8 are loaded; a token takes 4 ms at both."""
    policies = (
        Policy(name="default", build=False),
        Policy(name="moving", adaptive=True, **RULES),
        Policy(name="staying", **RULES),
        Policy(name="strict", adaptive=True, max_ppl_ratio=1.0, **RULES),
    )
    gateway = Gateway(
        make_settings(policies=policies),
        speed=FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=4.0),
        options=FakeModel(tpot_ms=4.0, build_seconds=0.01),
    )
    with (
        LiveServer(gateway.open) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        assert http.post("/v1/levels/int8:warm").status_code == 200
        yield gateway, http


def slow(gateway: Gateway, level: str, tpot_ms: float) -> None:
    engine = gateway.pool._roster.variant(MODEL, level).engine
    assert isinstance(engine, FakeEngine)
    engine.speed = FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=tpot_ms)


def stream(
    http: httpx.Client, policy: str, then: Callable[[int], None], **more: Any
) -> dict[str, Any]:
    """Stream an answer, calling `then` with the number of tokens so far; its `compression`."""
    body = {"model": MODEL, "prompt": "words", "max_tokens": TOKENS, "stream": True, **more}
    count, told = 0, None
    with http.stream("POST", TEXT, json=body | {"sla": {"policy": policy}}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            told = event.get("compression", told)
            if any(choice.get("text") for choice in event["choices"]):
                count += 1
                then(count)
    assert told is not None
    return dict(told)


def contiguous(ranges: list[dict[str, Any]], tokens: int = TOKENS) -> bool:
    joined = all(a["to"] == b["from"] and a["level"] != b["level"] for a, b in pairwise(ranges))
    return joined and ranges[0]["from"] == 0 and ranges[-1]["to"] == tokens


def test_an_answer_in_danger_goes_on_at_a_faster_level(live: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = live
    told = stream(
        http, "moving", lambda count: slow(gateway, "bf16", 40.0) if count == 10 else None
    )
    assert told["level"] == "bf16"
    assert [part["level"] for part in told["levels"]][:2] == ["bf16", "int8"]
    assert 10 <= told["levels"][0]["to"] <= 40
    assert contiguous(told["levels"])
    assert told["slo_met"] is (told["measured"]["tpot_ms"] <= 12.0)
    metrics = http.get("/metrics").text
    moved = re.search(r'level_changes_total\{level="bf16",model="fake",to="int8"\} (\S+)', metrics)
    assert moved
    assert float(moved[1]) >= 1
    assert gateway.settles()


def test_nothing_moves_unless_the_policy_says_so(live: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = live
    told = stream(
        http, "staying", lambda count: slow(gateway, "bf16", 25.0) if count == 10 else None
    )
    assert "levels" not in told
    assert told["slo_met"] is False


def test_nothing_moves_below_the_quality_floor(live: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = live
    told = stream(
        http, "strict", lambda count: slow(gateway, "bf16", 25.0) if count == 10 else None
    )
    assert told["levels"] == [{"level": "bf16", "from": 0, "to": TOKENS}]


def test_each_of_several_sequences_tells_its_own_way(live: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = live
    told = stream(
        http, "moving", lambda count: slow(gateway, "bf16", 40.0) if count == 20 else None, n=2
    )
    assert len(told["levels"]) == 2
    assert all(contiguous(ranges) for ranges in told["levels"])
    assert any(len(ranges) > 1 for ranges in told["levels"])
    assert gateway.settles()


def test_the_whole_answer_tells_the_same(live: tuple[Gateway, httpx.Client]) -> None:
    gateway, http = live
    slow(gateway, "bf16", 40.0)
    body = {"model": MODEL, "prompt": "words", "max_tokens": 60, "sla": {"policy": "moving"}}
    answer = http.post(TEXT, json=body).json()
    ranges = answer["compression"]["levels"]
    assert [part["level"] for part in ranges][:2] == ["bf16", "int8"]
    assert contiguous(ranges, 60)
    assert answer["usage"]["completion_tokens"] == 60
    assert gateway.settles()
