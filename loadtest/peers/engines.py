"""The engines that are timed in turn, behind one interface: ours, llama.cpp, OpenVINO GenAI and
transformers. Each runs in processes of its own; loading and converting are outside any timing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from loadtest.peers import convert
from loadtest.peers.child import Child, EngineError, Skipped
from loadtest.peers.place import Place
from loadtest.shapes import SHAPES

OURS = "pressgate"
# Equal bits: embeddings and head in 8 bits, as llama.cpp (6 and 4, 8) and OpenVINO (8) have them.
LEVELS = {32: "fp32", 16: "bf16", 8: "int8+embed8", 4: "int4-rtn-g64+embed8"}
_HERE = Path(__file__).parent
_TIMEOUT = 300.0  # of one measurement, s
_BUILD_TIMEOUT = 3600.0
_DTYPES = {32: "float32", 16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Ask:
    """One measurement: `decode` `tokens` steps of `batch` sequences after prompts of `prompt`
    tokens, or `prefill` one prompt of `tokens`."""

    kind: Literal["decode", "prefill"]
    tokens: int
    batch: int = 1
    prompt: int = 8

    @property
    def title(self) -> str:
        if self.kind == "decode":
            return f"decode, batch {self.batch}"
        return f"prefill {self.tokens}"


@dataclass(frozen=True, slots=True)
class Case:
    """What is served: a shape in so many bits; `level` is ours."""

    shape: str
    bits: int
    level: str
    threads: int


class Engine(Protocol):
    """An engine that is loaded and answers with tokens per second."""

    @property
    def name(self) -> str: ...

    @property
    def what(self) -> str:
        """The form of the weights, in the engine's own words."""
        ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    def rate(self, ask: Ask) -> float:
        """Tokens per second of one measurement. Raises: EngineError."""
        ...

    def close(self) -> None: ...


class Asked:
    """An engine in a child process that answers with seconds and tokens."""

    def __init__(
        self, name: str, what: str, child: Child, versions: Mapping[str, str], level: str = ""
    ) -> None:
        self.name, self.what, self.versions = name, what, versions
        self._child = child
        self._level = {"level": level} if level else {}

    def rate(self, ask: Ask) -> float:
        answer = self._child.ask(asdict(ask) | self._level, _TIMEOUT)
        return float(answer["tokens"]) / float(answer["seconds"])

    def close(self) -> None:
        self._child.close()


class LlamaCpp:
    """llama.cpp by its own benchmarks: `llama-bench`, and `llama-batched-bench` for batches. Each
    call loads the model and warms up by itself, outside its timing."""

    name = "llama.cpp"

    def __init__(self, binaries: Path, model: Path, what: str, threads: int) -> None:
        self.what = what
        self._binaries, self._model, self._threads = binaries, model, threads
        self.versions: Mapping[str, str] = {}

    def rate(self, ask: Ask) -> float:
        if ask.kind == "decode" and ask.batch > 1:
            return self._batched(ask)
        prompt, new = (ask.tokens, 0) if ask.kind == "prefill" else (0, ask.tokens)
        found = self._run("llama-bench", "-p", prompt, "-n", new, "-r", 1, "-o", "json")
        result = json.loads(found)[0]
        self.versions = {"llama.cpp": str(result["build_commit"])}
        return float(result["avg_ts"])

    def close(self) -> None:
        pass

    def _batched(self, ask: Ask) -> float:
        context = ask.batch * (ask.prompt + ask.tokens) + 64
        sizes = ("-npp", ask.prompt, "-ntg", ask.tokens, "-npl", ask.batch, "-c", context)
        found = self._run("llama-batched-bench", *sizes, "--output-format", "jsonl")
        line = next(line for line in found.splitlines() if line.startswith("{"))
        return float(json.loads(line)["speed_tg"])

    def _run(self, binary: str, *arguments: str | int) -> str:
        command = [str(self._binaries / binary), "-m", str(self._model), "-t", str(self._threads)]
        try:
            done = subprocess.run(
                [*command, *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            raise EngineError(f"{binary}: {str(said)[-400:]}") from None
        return done.stdout


def pace(place: Place, case: Case, **more: int) -> Child:
    """Our engine core in a process that times levels; `more` are settings of its `Setup`.

    Raises:
        EngineError: it ended at once.
    """
    folder = convert.checkpoint(place, case.shape)
    threads = {"OMP_NUM_THREADS": str(case.threads)}
    child = Child(OURS, [sys.executable, "-m", "gateway.variants.pace"], threads)
    setup = {"folder": str(folder), "name": case.shape, "cache_dir": str(place.cache)}
    try:
        child.tell(setup | {"threads": case.threads} | more)
    except EngineError:
        child.close()
        raise
    return child


def open_pressgate(place: Place, case: Case) -> Engine:
    """Ours, without HTTP: the engine core of `pressgate serve`, on a level built beforehand."""
    child = pace(place, case)
    try:
        for kind in ("make", "load"):
            child.ask({"kind": kind, "level": case.level}, _BUILD_TIMEOUT)
    except EngineError:
        child.close()
        raise
    return Asked(OURS, case.level, child, {}, case.level)


def open_llama(place: Place, case: Case) -> Engine:
    """llama.cpp on the same weights, quantized by its own tool."""
    kind = convert.GGUF_KINDS[case.bits]
    return LlamaCpp(place.llama, convert.gguf(place, case.shape, case.bits), kind, case.threads)


def open_openvino(place: Place, case: Case) -> Engine:
    """OpenVINO GenAI on the same weights, converted by optimum-intel."""
    folder = convert.openvino(place, case.shape, case.bits)
    setup = {
        "model": str(folder),
        "threads": case.threads,
        "vocab": SHAPES[case.shape].vocab,
        "properties": convert.OPENVINO_PROPERTIES[case.bits],
    }
    python = str(place.python("openvino_genai"))
    return _worker("OpenVINO", convert.OPENVINO_KINDS[case.bits], python, setup)


def open_transformers(place: Place, case: Case) -> Engine:
    """transformers' `generate`, in our own Python."""
    if case.bits not in _DTYPES:
        raise Skipped("transformers: no comparable path for integers on a CPU")
    setup = {
        "model": str(convert.checkpoint(place, case.shape)),
        "threads": case.threads,
        "vocab": SHAPES[case.shape].vocab,
        "dtype": _DTYPES[case.bits],
    }
    return _worker("transformers", setup["dtype"], sys.executable, setup)


def _worker(name: str, what: Any, python: str, setup: Mapping[str, Any]) -> Engine:
    scripts = [str(_HERE / "answers.py"), str(_HERE / f"{name.lower()}_worker.py")]
    threads = str(setup["threads"])
    child = Child(name, [python, *scripts], {"OMP_NUM_THREADS": threads})
    try:
        versions = child.ask(setup)["versions"]
    except EngineError:
        child.close()
        raise
    return Asked(name, str(what), child, versions)


# By the name of `--peers`; ours always takes part.
PEERS: dict[str, Callable[[Place, Case], Engine]] = {
    "llama.cpp": open_llama,
    "openvino": open_openvino,
    "transformers": open_transformers,
}
