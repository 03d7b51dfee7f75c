"""The `gateways` command: our gateway and LiteLLM's proxy, the same requests, one core each.

Two tests: `alone` (each gateway answers by itself: our stand-in engine, LiteLLM's `mock_response`)
and `upstream` (both pass the request on to the same stand-in server). In each, gateways take turns;
what one caller waits longer than for the stand-in server itself is what a gateway adds. Gateways
run on one core, client and stand-in server on the others where there are any.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import typer
import yaml
from rich.console import Console
from rich.table import Table

from loadtest import options as opt
from loadtest.client import PATHS
from loadtest.machine import provenance
from loadtest.mix import BadInput
from loadtest.peers.child import EngineError
from loadtest.peers.servers import Server, Spec

OURS: Final = "pressgate"
LITELLM: Final = "litellm"
DIRECT: Final = "stand-in server"
TESTS: Final = ("alone", "upstream")
HOW_TO_INSTALL: Final = (
    "not measured: give --litellm the command of an installation of its own: "
    "python3 -m venv litellm && litellm/bin/pip install 'litellm[proxy]', "
    "then --litellm litellm/bin/litellm"
)
_KEY: Final = "sk-none"  # the stand-in asks for none; LiteLLM wants to see one
_QUESTION: Final = "How does a gateway keep a promise about latency? " * 2
_WARM_UP: Final = 50


@dataclass(frozen=True, slots=True)
class Load:
    """How hard and how long a gateway is asked; `seconds` per round for either measurement."""

    users: int
    seconds: float
    rounds: int
    max_tokens: int
    stream: bool


@dataclass(slots=True)
class Side:
    """One server in one test. Latencies in seconds; `rates`: requests/s, one per round."""

    url: str
    model: str
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def command(
    *,
    litellm: Annotated[
        str | None,
        typer.Option(envvar="LITELLM", help="LiteLLM's command; without it only ours is measured."),
    ] = None,
    tests: Annotated[str, typer.Option(help="Comma-separated: alone, upstream.")] = "alone",
    users: Annotated[int, typer.Option(min=1, max=1000, help="Callers of the rates.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.2, max=600, callback=opt.finite)] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, max=100)] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 16,
    stream: Annotated[bool, typer.Option("--stream/--no-stream")] = False,
    json_out: opt.JsonOut = None,
) -> None:
    """Compare our gateway with LiteLLM's proxy: requests per second and added latency."""
    opt.check_writable(json_out, "--json")
    wanted = tests.split(",")
    if unknown := set(wanted) - set(TESTS):
        raise BadInput(f"--tests {', '.join(sorted(unknown))}: not among {', '.join(TESTS)}")
    if litellm is not None and shutil.which(litellm) is None:
        raise BadInput(f"--litellm {litellm}: no such command; {HOW_TO_INSTALL}")
    load = Load(users, seconds, rounds, max_tokens, stream)
    started = time.time()
    try:
        found = {name: _measure(name, litellm, load) for name in wanted}
    except (EngineError, aiohttp.ClientError, TimeoutError) as error:
        Console(stderr=True).print(f"error: {error or type(error).__name__}", markup=False)
        raise typer.Exit(1) from None
    report = provenance(started) | {
        "load": {"users": users, "seconds": seconds, "rounds": rounds, "stream": stream},
        "max_tokens": max_tokens,
        "tests": {name: summarize(sides) for name, sides in found.items()},
        LITELLM: "measured" if litellm else HOW_TO_INSTALL,
    }
    _show(report, opt.deliver_json(report, json_out))


def summarize(sides: Mapping[str, Side]) -> dict[str, Any]:
    """Per server its median requests/s and its latency percentiles in ms; per gateway also what it
    adds to the stand-in server's latency; `ratio`: our requests/s ÷ LiteLLM's."""
    rows: dict[str, Any] = {}
    for name, side in sides.items():
        rows[name] = {
            "requests_per_s": statistics.median(side.rates),
            "p50_ms": 1000 * _percentile(side.latencies, 0.50),
            "p99_ms": 1000 * _percentile(side.latencies, 0.99),
        }
    for name in rows.keys() - {DIRECT}:
        for key in ("p50_ms", "p99_ms"):
            rows[name]["added_" + key] = rows[name][key] - rows[DIRECT][key]
    ratio = None
    if LITELLM in rows:
        ratio = rows[OURS]["requests_per_s"] / rows[LITELLM]["requests_per_s"]
    return {"servers": rows, "ratio": ratio}


def _percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- measuring ------------------------------------------------------------------------------------


def _measure(test: str, litellm: str | None, load: Load) -> dict[str, Side]:
    """Start the servers of a test, ask them in turn, end them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gateway_cores, other_cores = _split_cores()
        stack.enter_context(_on(other_cores))

        def start(spec: Spec, cores: set[int]) -> Server:
            with _on(cores):  # inherited
                server = Server(spec)
            stack.callback(server.close)
            return server

        standin = start(_standin(), other_cores)
        sides = {DIRECT: Side(standin.url, "fake")}
        specs = [_pressgate(folder, test, standin.url)]
        if litellm is not None:
            specs.append(_litellm(folder, test, litellm, standin.url))
        for spec in specs:
            server = start(spec, gateway_cores)
            sides[spec.name] = Side(server.url, spec.model)
        asyncio.run(_take_turns(sides, load))
    return sides


async def _take_turns(sides: Mapping[str, Side], load: Load) -> None:
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {_KEY}"}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        for side in sides.values():
            for _ in range(_WARM_UP):
                await _ask(session, side, load)
        for _ in range(load.rounds):
            for side in sides.values():
                taken, _ = await _drive(session, side, load, users=1)
                side.latencies += taken
            for side in sides.values():
                taken, elapsed = await _drive(session, side, load, users=load.users)
                side.rates.append(len(taken) / elapsed)


async def _drive(
    session: aiohttp.ClientSession, side: Side, load: Load, *, users: int
) -> tuple[list[float], float]:
    """(latency of every request, seconds from the first to the last)."""
    start = time.perf_counter()
    taken: list[float] = []

    async def user() -> None:
        while time.perf_counter() - start < load.seconds:
            taken.append(await _ask(session, side, load))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(users):
            tasks.create_task(user())
    return taken, time.perf_counter() - start


async def _ask(session: aiohttp.ClientSession, side: Side, load: Load) -> float:
    """Seconds of one request.

    Raises:
        EngineError: it was not answered with 200.
    """
    body = {
        "model": side.model,
        "messages": [{"role": "user", "content": _QUESTION}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": load.stream,
    }
    sent = time.perf_counter()
    async with session.post(side.url + PATHS["chat"], json=body) as response:
        answer = await response.read()
        if response.status != 200:
            raise EngineError(f"{side.url}: {response.status}: {answer[:300]!r}")
    return time.perf_counter() - sent


# -- servers --------------------------------------------------------------------------------------


def _standin() -> Spec:
    command = [sys.executable, "-m", "loadtest.standin", "{port}"]
    return Spec(DIRECT, command, "/v1/models", "fake", "", {}, {})


def _pressgate(folder: Path, test: str, upstream: str) -> Spec:
    """With the stand-in engine, or with a level that lives in the stand-in server."""
    settings: dict[str, Any] = {
        "cache": {"dir": str(folder / "cache")},
        "policies": [{"name": "default", "build": False}],
        "log_level": "warning",
    }
    if test == "alone":
        fake = {"tpot_ms": 0.0, "prefill_tokens_per_s": 1e12}
        settings["models"] = [{"id": "fake", "path": "fake", "fake": fake}]
        settings["levels"] = ["int8", "int4-rtn-g64"]
        model = "fake"
    else:
        remote = {"url": upstream, "model": "fake"}
        settings["models"] = [{"id": "docs-17m", "upstream": {"remote": remote}}]
        settings["levels"] = []
        model = "docs-17m@remote"
    file = _write(folder / "pressgate.yaml", settings)
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", file, "--port", "{port}"]
    return Spec(OURS, command, "/readyz", model, "", {}, {})


def _litellm(folder: Path, test: str, executable: str, upstream: str) -> Spec:
    """One worker, as ours; no database, no keys, no logging."""
    params = {"model": "openai/fake", "api_base": upstream + "/v1", "api_key": _KEY}
    if test == "alone":
        params["mock_response"] = "word " * 16
    settings = {
        "model_list": [{"model_name": "fake", "litellm_params": params}],
        "litellm_settings": {"telemetry": False, "set_verbose": False},
    }
    file = _write(folder / "litellm.yaml", settings)
    command = [str(Path(shutil.which(executable) or executable).absolute())]
    command += ["--config", file, "--host", "127.0.0.1", "--port", "{port}", "--num_workers", "1"]
    environment = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no keys, as ours
        "NO_DOCS": "True",
    }
    return Spec(LITELLM, command, "/health/liveliness", "fake", "", {}, environment)


def _write(file: Path, settings: Mapping[str, Any]) -> str:
    file.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    return str(file)


def _split_cores() -> tuple[set[int], set[int]]:
    """(the gateway's core, the others); the same one where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:]) or {cores[0]}


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Run on these cores for a while."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# -- showing --------------------------------------------------------------------------------------


def _show(report: Mapping[str, Any], console: Console) -> None:
    for name, test in report["tests"].items():
        columns = ("server", "requests/s", "p50 ms", "p99 ms", "added p50", "added p99")
        table = Table(*columns, title=f"{name}: {report['load']['users']} callers; latency of one")
        for server, row in test["servers"].items():
            added = [_ms(row.get(f"added_{key}")) for key in ("p50_ms", "p99_ms")]
            rate = f"{row['requests_per_s']:.0f}"
            table.add_row(server, rate, _ms(row["p50_ms"]), _ms(row["p99_ms"]), *added)
        console.print(table)
        if test["ratio"] is not None:
            console.print(f"{OURS} ÷ {LITELLM}: {test['ratio']:.1f}× the requests/s")
    if report[LITELLM] != "measured":
        console.print(f"{LITELLM}: {report[LITELLM]}", markup=False, soft_wrap=True)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
