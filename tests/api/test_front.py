"""The short way to a generation and the way through the router answer alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.support.fake_pool import MODEL, Gateway
from tests.support.live import LiveServer

CHAT = "/v1/chat/completions"
PREFIX = "/behind/a/prefix"


class Both(Gateway):
    """One gateway reached at the root, where the short way is, and under a prefix, where it is
    not."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        async with super().open() as app:
            yield Starlette(routes=[Mount(PREFIX, app), Mount("/", app)])


@pytest.fixture(scope="module")
def gateway() -> Both:
    return Both()


@pytest.fixture(scope="module")
def http(gateway: Both) -> Iterator[httpx.Client]:
    with LiveServer(gateway.open) as server, httpx.Client(base_url=server.url) as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": MODEL, "messages": messages, "max_tokens": 5, "temperature": 0, **changes}


def steady(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one answer to the next."""
    compression = answer.get("compression", {})
    told = {key: compression.get(key) for key in ("level", "policy", "slo_met")}
    left = {k: v for k, v in answer.items() if k not in ("id", "created")} | {"compression": told}
    if "error" in left:
        left["error"] = {k: v for k, v in left["error"].items() if k != "decision_id"}
    return left


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        pytest.param(CHAT, body(), 200, id="a chat"),
        pytest.param(
            "/v1/completions",
            {"model": MODEL, "prompt": "hello", "max_tokens": 3, "temperature": 0},
            200,
            id="a completion",
        ),
        pytest.param(CHAT, body(n=0), 400, id="a bad field"),
        pytest.param(CHAT, body(model="nobody"), 404, id="no such model"),
        pytest.param(CHAT, body(sla={"policy": "nobody"}), 404, id="no such policy"),
        pytest.param(
            CHAT, body(sla={"memory_mb": 0.001, "on_miss": "reject"}), 422, id="a budget unmet"
        ),
    ],
)
def test_both_ways_answer_alike(
    http: httpx.Client, path: str, sent: dict[str, Any], status: int
) -> None:
    short, routed = (http.post(prefix + path, json=sent) for prefix in ("", PREFIX))
    assert short.status_code == routed.status_code == status
    assert steady(short.json()) == steady(routed.json())
    kept = ("content-type", "x-pressgate-level", "retry-after")
    assert [short.headers.get(k) for k in kept] == [routed.headers.get(k) for k in kept]


def test_a_refusal_counts_once_whatever_way_it_came(http: httpx.Client, gateway: Both) -> None:
    def refused() -> float:
        name = "pressgate_requests_total"
        labels = {"model": "none", "level": "none", "policy": "none", "code": "400"}
        return gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    for prefix in ("", PREFIX):
        before = refused()
        assert http.post(prefix + CHAT, json={}).status_code == 400
        assert refused() == before + 1


def test_a_body_in_pieces_is_read_whole(http: httpx.Client) -> None:
    pieces = [
        b'{"model": "fake", "messages": [{"role": "user", ',
        b'"content": "x"}], ',
        b'"n": 1}',
    ]
    answer = http.post(CHAT, content=iter(pieces), headers={"content-type": "application/json"})
    assert answer.status_code == 200


def test_of_two_headers_of_one_name_the_first_counts(http: httpx.Client) -> None:
    headers = [("content-type", "application/json"), ("content-type", "text/plain")]
    assert http.post(CHAT, content=b"{}", headers=headers).json()["error"]["param"] == "model"
    answer = http.post(CHAT, content=b"{}", headers=headers[::-1])
    assert answer.json()["error"]["param"] == "content-type"


def test_what_a_decision_took_is_measured(http: httpx.Client, gateway: Both) -> None:
    assert http.post(CHAT, json=body()).status_code == 200
    labels = {"model": MODEL}
    registry = gateway.metrics.registry
    count = registry.get_sample_value("pressgate_decision_seconds_count", labels)
    total = registry.get_sample_value("pressgate_decision_seconds_sum", labels)
    assert count is not None
    assert count >= 1
    assert total is not None
    assert 0 < total < 10 * count
