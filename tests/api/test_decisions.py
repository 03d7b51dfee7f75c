"""Decisions asked for afterwards, over a real port: by whom, for how long, over a restart, from
another replica; and the decision log.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from cache.journal import Journal
from cache.stamps import new_stamp
from gateway.api.ledger import MAX_PENDING, MAX_RECENT, Ledger
from gateway.app import make_app, open_gateway
from gateway.cli import app
from gateway.config import ApiKey, Cache, Decisions, FakeModel, Limits, Model, Settings
from gateway.errors import ConfigError
from gateway.policy.decide import decide
from gateway.policy.decision import Ask
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.policy.record import Record, Result
from gateway.policy.trace import read_trace
from tests.policy.ladders import ladder
from tests.support.live import LiveServer
from tests.support.redis_server import RedisServer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "fake", "prompt": "top secret words", "max_tokens": 4}


def settings(folder: Path, **more: Any) -> Settings:
    fake = FakeModel(tpot_ms=0.2, build_seconds=0)
    base: dict[str, Any] = {
        "models": (Model(id="fake", path="fake", fake=fake),),
        "levels": ("bf16", "int8"),
        "cache": Cache(dir=folder / "cache"),
        "policies": (Policy(name="default", build=False),),
    }
    return Settings(**(base | more))


def serving(options: Settings) -> LiveServer:
    @asynccontextmanager
    async def opened() -> AsyncIterator[FastAPI]:
        async with open_gateway(options) as services:
            while not services.pool.ready:  # noqa: ASYNC110 - the pool has no event for it
                await asyncio.sleep(0.005)
            yield make_app(services)

    return LiveServer(opened)


def client(server: LiveServer, key: str | None = None) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=server.url, headers=headers, timeout=30)


def eventually(get: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (found := get()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def finished(http: httpx.Client, name: str) -> dict[str, Any]:
    """The decision once its request has ended (an answer reaches its caller just before)."""

    def get() -> Any:
        told = http.get(f"/v1/decisions/{name}").json()
        return told if told.get("result") else None

    return dict(eventually(get))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(settings(tmp_path_factory.mktemp("decisions"))) as live:
        yield live


def test_an_answer_can_be_asked_about(server: LiveServer) -> None:
    with client(server) as http:
        answer = http.post(TEXT, json=BODY | {"sla": {"ttft_ms": 5000, "tpot_ms": 1000}})
        name = answer.json()["compression"]["decision_id"]
        assert answer.headers["x-pressgate-decision"] == name
        told = finished(http, name)
    assert told["object"] == "decision"
    assert told["id"] == name
    assert abs(told["created"] - time.time()) < 60
    assert told["sla"] == {"ttft_ms": 5000, "tpot_ms": 1000}
    assert told["decision"]["level"] == told["result"]["level"] == "bf16"
    assert {level["level"] for level in told["levels"]} == {"bf16", "int8"}
    assert told["levels"][0]["predicted"]["ttft_high_ms"] > 0
    assert {one["level"] for one in told["counterfactuals"]["levels"]} == {"int8"}
    assert told["result"]["generated_tokens"] == 4
    assert told["result"]["slo_met"] is True
    measured = answer.json()["compression"]["measured"]
    assert told["result"]["measured"]["ttft_ms"] == pytest.approx(measured["ttft_ms"], abs=0.1)
    assert told["result"]["promises"]["ttft_ms"]["kept"] is True
    assert "secret" not in json.dumps(told)


def test_streams_and_refusals_name_their_decision(server: LiveServer) -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    with client(server) as http:
        stream = http.post(CHAT, json=chat | {"stream": True})
        events = [line[6:] for line in stream.text.splitlines() if line.startswith("data: {")]
        (facts,) = [e["compression"] for e in map(json.loads, events) if "compression" in e]
        assert stream.headers["x-pressgate-decision"] == facts["decision_id"]
        assert finished(http, facts["decision_id"])["result"]["generated_tokens"] == 3
        refused = http.post(TEXT, json=BODY | {"sla": {"tpot_ms": 0.001, "on_miss": "reject"}})
        assert refused.status_code == 422
        name = refused.json()["error"]["decision_id"]
        assert refused.headers["x-pressgate-decision"] == name
        told = finished(http, name)
        assert told["decision"]["action"] == "reject"
        assert told["decision"]["reason"] == refused.json()["error"]["message"]
        assert told["result"]["code"] == 422
        assert told["result"]["slo_met"] is None
        assert told["counterfactuals"]["levels"][0]["relaxed"]["bounds"]["tpot_ms"] > 0.001
        unknown = http.post(TEXT, json=BODY | {"model": "nobody"})
        assert "x-pressgate-decision" not in unknown.headers


@pytest.mark.parametrize("name", ["dec-1", "x", "dec-now", "dec-" + "0" * 26])
def test_an_unknown_decision_is_not_found(server: LiveServer, name: str) -> None:
    name = new_stamp("dec", time.time()) if name == "dec-now" else name
    with client(server) as http:
        missing = http.get(f"/v1/decisions/{name}")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "decision_not_found"
    assert missing.json()["error"]["param"] == "id"


def test_before_and_after_agree(server: LiveServer) -> None:
    body = BODY | {"sla": {"memory_mb": 1e6, "objective": "memory"}}
    with client(server) as http:
        before = http.post("/v1/explain", json=body).json()
        name = http.post(TEXT, json=body).json()["compression"]["decision_id"]
        after = finished(http, name)
    for field in ("model", "policy", "budget", "objective", "on_miss", "prompt_tokens"):
        assert before[field] == after[field]
    assert before["decision"]["level"] == after["decision"]["level"]
    assert before["counterfactuals"]["levels"][0]["level"] == "int8"


def test_a_key_sees_its_own_decisions_and_an_admin_all(tmp_path: Path) -> None:
    def key(name: str, *scopes: Any) -> ApiKey:
        return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=scopes)

    keys = (key("ann", "inference"), key("bob", "inference"), key("eve", "admin"))
    with (
        serving(settings(tmp_path, api_keys=keys)) as live,
        client(live, "ann") as ann,
        client(live, "bob") as bob,
        client(live, "eve") as admin,
        client(live) as nobody,
    ):
        name = ann.post(TEXT, json=BODY).json()["compression"]["decision_id"]
        assert finished(ann, name)["key"] == "ann"
        for _ in range(2):  # from memory as objects, then as bytes
            assert admin.get(f"/v1/decisions/{name}").status_code == 200
            assert bob.get(f"/v1/decisions/{name}").status_code == 404
            assert nobody.get(f"/v1/decisions/{name}").status_code == 401
            time.sleep(0.6)


def test_a_restart_keeps_the_day_and_log_lines_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "decisions.jsonl"
    options = settings(tmp_path, decisions=Decisions(log=log, log_bytes=4096, log_files=3))
    with serving(options) as live, client(live) as http:
        names = [http.post(TEXT, json=BODY).json()["compression"]["decision_id"] for _ in range(30)]
        http.post(TEXT, json=BODY | {"sla": {"tpot_ms": 0.001, "on_miss": "reject"}})
        before = finished(http, names[0])
    with serving(options) as live, client(live) as http:
        assert http.get(f"/v1/decisions/{names[0]}").json() == before
        assert http.get(f"/v1/decisions/{names[-1]}").json()["result"]["code"] == 200
    files = sorted(log.parent.iterdir())
    assert [file.name for file in files] == [f"decisions.jsonl{end}" for end in ("", ".1", ".2")]
    assert all(file.stat().st_size <= 4096 for file in files)
    newest = [json.loads(text) for text in log.read_text().splitlines()]
    assert newest[-1]["code"] == 422
    assert newest[-1]["action"] == "reject"
    served = json.loads(files[1].read_text().splitlines()[-1])
    assert {"ts", "prompt_tokens", "generated_tokens", "max_tokens", "policy", "sla", "key"} <= set(
        served
    )
    assert (served["level"], served["code"], served["slo_met"]) == ("bf16", 200, True)
    assert served["decision_id"] in names
    assert served["measured"]["ttft_ms"] > 0
    assert not any("secret" in file.read_text() for file in files)
    assert log.stat().st_mode & 0o077 == 0


def test_texts_are_logged_only_when_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    options = settings(tmp_path, decisions=Decisions(log=log, log_text=True))
    with serving(options) as live, client(live) as http:
        answer = http.post(TEXT, json=BODY).json()
    (entry,) = map(json.loads, log.read_text().splitlines())
    assert entry["prompts"] == ["top secret words"]
    assert entry["answers"] == [answer["choices"][0]["text"]]
    kept = (tmp_path / "cache" / "decisions.sqlite").read_bytes()
    assert b"secret" not in kept


def test_a_log_that_cannot_be_written_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = settings(tmp_path, decisions=Decisions(log=tmp_path / "file" / "log.jsonl"))
    with pytest.raises(ConfigError, match=r"decisions\.log"), serving(options):
        pass


def test_replicas_answer_for_each_other(tmp_path: Path, redis_server: RedisServer) -> None:
    def replica(name: str) -> LiveServer:
        folder = tmp_path / name
        cache = Cache(dir=folder / "cache", redis_url=redis_server.url)  # type: ignore[arg-type]
        return serving(settings(folder, cache=cache))

    with replica("a") as one, replica("b") as two, client(one) as here, client(two) as there:
        name = here.post(TEXT, json=BODY).json()["compression"]["decision_id"]
        told = eventually(
            lambda: (r := there.get(f"/v1/decisions/{name}")).status_code == 200 and r.json()
        )
        assert told == finished(here, name)
        redis_server.kill()
        second = here.post(TEXT, json=BODY).json()["compression"]["decision_id"]
        assert finished(here, second)["result"]["code"] == 200
        assert there.get(f"/v1/decisions/{second}").status_code == 404
        lost = 'pressgate_decision_records_lost_total{where="redis"} 1.0'
        eventually(lambda: lost in here.get("/metrics").text)


# -- the ledger alone ---------------------------------------------------------------------------


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def record(ledger: Ledger, clock: Clock, key: str | None = None) -> Record:
    decision = decide(Ask("m", 10, 10), Policy(name="p"), ladder(), Predictor().predict)
    made = Record(ledger.new_id(), clock(), key, "", decision)
    ledger.opened(made)
    return made


RESULT = Result(200, "bf16", 3, {}, (), 0.1)


async def test_time_ends_a_decision() -> None:
    clock = Clock()
    ledger = Ledger(ttl=3600, clock=clock)
    made = record(ledger, clock, "ann")
    assert (await ledger.read(made.id)) is not None
    assert (await ledger.read(made.id, "ann")) is not None
    assert (await ledger.read(made.id, "bob")) is None
    clock.now += 3599
    assert (await ledger.read(made.id)) is not None
    clock.now += 2
    assert (await ledger.read(made.id)) is None


async def test_memory_is_bounded_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    clock, lost = Clock(), dict[str, int]()
    journal = Journal(tmp_path / "j.sqlite", prefix="dec", ttl=3600, budget=2**24, clock=clock)
    ledger = Ledger(
        journal, clock=clock, on_lost=lambda where, n: lost.update({where: lost.get(where, 0) + n})
    )
    first = record(ledger, clock)
    for index in range(MAX_PENDING + 50):
        made = first if index == 0 else Record(ledger.new_id(), clock(), None, "", first.decision)
        made.result = RESULT
        ledger.opened(made)
        ledger.closed(made)
    assert len(ledger._recent) == MAX_RECENT
    assert lost == {"memory": 50}
    await ledger.flush()
    assert len(ledger._recent) == MAX_RECENT
    told = await ledger.read(first.id)
    assert told is not None, "forgotten in memory, found on disk"
    assert told["result"]["code"] == 200
    await ledger.close()


# -- the command line ---------------------------------------------------------------------------


def test_the_command_tells_of_a_decision_by_its_id(server: LiveServer) -> None:
    with client(server) as http:
        body = BODY | {"sla": {"ttft_ms": 5000, "tpot_ms": 0.001}}
        name = http.post(TEXT, json=body).json()["compression"]["decision_id"]
        told = finished(http, name)

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["explain", *words, "--url", server.url])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    shown = run(name)
    assert told["decision"]["reason"] in shown
    assert "ttft_ms 5000: kept" in shown
    assert "tpot_ms 0.001: broken" in shown
    assert "bf16" in shown
    assert json.loads(run(name, "--json")) == told
    before = run("top secret words", "--memory-mb", "1e6")
    assert "Measured" not in before
    assert "would have" in before


def test_a_log_can_be_replayed(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    limits = Limits(max_concurrent_per_key=1)
    slow = (Model(id="fake", path="fake", fake=FakeModel(tpot_ms=20, build_seconds=0)),)
    options = settings(tmp_path, decisions=Decisions(log=log), limits=limits, models=slow)
    with serving(options) as live, client(live) as http, client(live) as other:
        http.post(TEXT, json=BODY | {"sla": {"ttft_ms": 5000}})
        http.post(TEXT, json=BODY | {"sla": {"tpot_ms": 0.001, "on_miss": "reject"}})
        long = BODY | {"max_tokens": 3000, "stream": True}
        with http.stream("POST", TEXT, json=long) as stream:
            events = stream.iter_lines()  # held: one that is dropped closes the stream
            next(events)
            assert other.post(TEXT, json=BODY).status_code == 429
            running = other.get(f"/v1/decisions/{stream.headers['x-pressgate-decision']}").json()
            assert running["decision"]["level"] == "bf16"
            assert running["result"] is None
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert [entry["code"] for entry in lines] == [200, 422, 429, 499]
    assert len({tuple(sorted(entry)) for entry in lines}) == 1, "the same fields in every line"
    assert lines[2]["decision_id"] is None, "too many at once: nothing was decided"
    served, refused, gone, crowded = read_trace(log)
    assert gone.max_tokens == 3000
    assert (crowded.max_tokens, crowded.key, crowded.policy) == (4, None, "default")
    assert (served.output_tokens, served.max_tokens, served.level) == (4, 4, "bf16")
    assert served.sla.ttft_ms == 5000
    assert served.path == TEXT
    assert refused.level is None
