"""Gateways side by side, driven for real: the stand-in server, ours, and a made-up LiteLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import pytest

from loadtest.gateways import DIRECT, LITELLM, OURS, Side, summarize
from loadtest.peers.servers import Server, Spec
from tests.loadtest.test_cli import loadtest

SHORT = ("compare", "gateways", "--users", "2", "--seconds", "0.3", "--rounds", "1", "--json", "-")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
def test_the_stand_in_answers_in_both_shapes(stream: bool, chat: bool) -> None:
    spec = Spec(DIRECT, [sys.executable, "-m", "loadtest.standin", "{port}"], "/", "", "", {}, {})
    server = Server(spec)
    try:
        asked = {"messages": []} if chat else {"prompt": "x"}
        answer = httpx.post(
            server.url + ("/v1/chat/completions" if chat else "/v1/completions"),
            json={"model": "fake", "max_tokens": 3, "stream": stream, **asked},
        )
    finally:
        server.close()
    if not stream:
        choice = answer.json()["choices"][0]
        assert (choice["message"]["content"] if chat else choice["text"]) == "word " * 3
        assert answer.json()["usage"]["completion_tokens"] == 3
        return
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    choices = [choice for event in events for choice in event["choices"]]
    said = [(c["delta"].get("content", "") if chat else c["text"]) for c in choices]
    assert said == ["word "] * 3 + [""]
    assert choices[-1]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 3


def test_without_litellm_ours_is_measured_and_the_way_to_it_told() -> None:
    done = loadtest(*SHORT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    servers = report["tests"]["alone"]["servers"]
    assert set(servers) == {DIRECT, OURS}
    assert servers[OURS]["requests_per_s"] > 0
    assert servers[OURS]["added_p50_ms"] == servers[OURS]["p50_ms"] - servers[DIRECT]["p50_ms"]
    assert report["tests"]["alone"]["ratio"] is None
    assert "pip install 'litellm[proxy]'" in done.stderr


def test_a_gateway_that_does_not_start_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "litellm"
    broken.write_text("#!/bin/sh\necho 'no key, no start'; exit 3\n")
    broken.chmod(0o755)
    done = loadtest(*SHORT, "--litellm", str(broken))
    assert done.returncode == 1
    assert "litellm: did not start: no key, no start" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--litellm", "/no/such/command"), "--litellm /no/such/command: no such command"),
        (("--tests", "alone,both"), "--tests both: not among alone, upstream"),
    ],
)
def test_bad_flags_are_named(flags: tuple[str, ...], says: str) -> None:
    done = loadtest(*SHORT, *flags)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


def test_rates_are_medians_and_latencies_pooled() -> None:
    sides = {
        DIRECT: Side("", "", [0.001] * 100, [5000.0]),
        OURS: Side("", "", [0.002] * 99 + [0.009], [900.0, 1000.0, 4000.0]),
        LITELLM: Side("", "", [0.011] * 100, [100.0, 125.0, 125.0]),
    }
    found = summarize(sides)
    assert found["ratio"] == 8
    assert found["servers"][OURS]["added_p50_ms"] == pytest.approx(1)
    assert found["servers"][OURS]["added_p99_ms"] == pytest.approx(8)
    assert found["servers"][LITELLM]["added_p99_ms"] == pytest.approx(10)
