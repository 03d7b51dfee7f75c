"""Servers on free ports of the loopback: ours, llama.cpp's and transformers', started and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import httpx
import yaml

from loadtest.client import Target
from loadtest.peers import convert
from loadtest.peers.child import EngineError, Skipped
from loadtest.peers.engines import OURS, Case
from loadtest.peers.place import Place

# `transformers serve` takes temperature 0 for an error; all are asked for the best token.
_GREEDY: dict[str, Any] = {"temperature": 0.0}
_START_SECONDS = 180.0
_SETTLE_SECONDS = 3600.0  # a first start of ours measures its levels
_SLOTS = 16
_CONTEXT_OF_SLOT = 512


@dataclass(frozen=True, slots=True)
class Spec:
    """How a server is started and asked.

    Attributes:
        command: with `{port}` where the port goes.
        ready: a path that answers 200 once it serves.
        model: what requests name.
    """

    name: str
    command: Sequence[str]
    ready: str
    model: str
    what: str
    body: Mapping[str, Any]
    environment: Mapping[str, str]


class Server:
    """A running server. `close` it."""

    def __init__(self, spec: Spec) -> None:
        self.name, self.what = spec.name, spec.what
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.target = Target(
            self.url,
            spec.model,
            endpoint="completions",
            body=spec.body,
            timeout=600.0,
            keep_alive=False,
        )
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in spec.command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(spec.environment),
            process_group=0,  # its own group to end, in our session: scheduled as we are
        )
        self._wait(spec.ready)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End the server and its children. Idempotent."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def _wait(self, path: str) -> None:
        """Until it serves. Raises: EngineError when it ends or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(self.url + path, timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()[-400:]
        self.close()
        raise EngineError(f"{self.name}: did not start: {said}")


def pressgate(place: Place, case: Case, levels: Sequence[str], folder: str) -> Spec:
    """`pressgate serve` with these levels; `folder` takes its configuration file.

    Asked for a level by name; `Spec.model` names `case.level`.
    """
    settings = {
        "models": [{"id": case.shape, "path": str(convert.checkpoint(place, case.shape))}],
        "levels": [level for level in levels if level != "bf16"],
        "threads": case.threads,
        "cache": {"dir": str(place.cache)},
        "engine": {"max_num_seqs": _SLOTS},
        "log_level": "warning",
    }
    file = f"{folder}/pressgate.yaml"
    with open(file, "w", encoding="utf-8") as out:  # noqa: PTH123 - a path in a temporary folder
        yaml.safe_dump(settings, out)
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", file, "--port", "{port}"]
    threads = {"OMP_NUM_THREADS": str(case.threads)}
    model = f"{case.shape}@{case.level}"
    return Spec(OURS, command, "/readyz", model, case.level, _GREEDY, threads)


def llama_server(place: Place, case: Case) -> Spec:
    """`llama-server`: continuous batching in 16 slots."""
    model = convert.gguf(place, case.shape, case.bits)
    command = [str(place.llama / "llama-server"), "-m", str(model), "-t", str(case.threads)]
    command += ["--host", "127.0.0.1", "--port", "{port}", "-np", str(_SLOTS)]
    command += ["-c", str(_SLOTS * _CONTEXT_OF_SLOT)]
    what = convert.GGUF_KINDS[case.bits]
    return Spec("llama-server", command, "/health", case.shape, what, _GREEDY, {})


def transformers_serve(place: Place, case: Case) -> Spec:
    """`transformers serve` with continuous batching; 16 or 32 bits."""
    dtype = {32: "float32", 16: "bfloat16"}.get(case.bits)
    if dtype is None:
        raise Skipped("transformers serve: no comparable path for integers on a CPU")
    folder = str(convert.checkpoint(place, case.shape))
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", folder, "--continuous-batching"]
    command += ["--port", "{port}", "--host", "127.0.0.1", "--device", "cpu", "--dtype", dtype]
    threads = {"OMP_NUM_THREADS": str(case.threads), "HF_HUB_OFFLINE": "1"}
    return Spec("transformers serve", command, "/health", folder, dtype, {}, threads)


def settle(server: Server, levels: Sequence[str], model: str) -> None:
    """Load every level of ours and wait until nothing is built or measured any more.

    Raises:
        EngineError: a level cannot be served.
    """
    for level in levels:
        body = {"model": f"{model}@{level}", "prompt": "the", "max_tokens": 2, "temperature": 0}
        for _ in range(2):
            answer = httpx.post(server.url + "/v1/completions", json=body, timeout=_SETTLE_SECONDS)
            if answer.status_code != httpx.codes.OK:
                raise EngineError(f"{server.name}: {level}: {answer.text[:300]}")
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        jobs = httpx.get(server.url + "/v1/jobs", timeout=60).json()["data"]
        if all(job["state"] in ("done", "failed", "cancelled") for job in jobs):
            return
        time.sleep(0.5)
    raise EngineError(f"{server.name}: still building after {_SETTLE_SECONDS:g} s")


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


# By the name of `--peers`.
PEER_SERVERS: dict[str, Callable[[Place, Case], Spec]] = {
    "llama-server": llama_server,
    "transformers": transformers_serve,
}
