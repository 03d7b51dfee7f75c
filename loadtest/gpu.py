"""`compare cuda`: our engine on a GPU against transformers, and its levels against its own bf16.

Weights are random and made on the device; nothing is downloaded or written. Engines are loaded
side by side in processes of their own and timed in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest import options as opt
from loadtest.compare import markdown
from loadtest.compare.cli import MarkdownOut, deliver
from loadtest.compare.rounds import in_turn, versus
from loadtest.mix import BadInput
from loadtest.peers.child import Child, EngineError
from loadtest.shapes import SHAPES, Shape

OURS = "pressgate"
GPU_SHAPES = SHAPES | {
    "8b": Shape(
        hidden=4096, layers=32, inner=14336, heads=32, kv_heads=8, vocab=128256, context=8192
    ),
    "1b": Shape(
        hidden=2048, layers=16, inner=8192, heads=32, kv_heads=8, vocab=128256, context=8192
    ),
}
WAYS = ("generate", "compiled", "generate_batch")
_PEERS = Path(__file__).parent / "peers"
_LOAD_TIMEOUT = 300.0
_TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One measurement of an engine; `ways` of transformers can do it.

    `kind`: `decode` (steps after the prompts), `streams` (whole answers) or `prefill`."""

    kind: str
    title: str
    tokens: int
    batch: int = 1
    prompt: int = 256
    ways: tuple[str, ...] = WAYS

    def message(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            "batch": self.batch,
            "prompt": self.prompt,
        }


ASKS = (
    Ask("decode", "decode, 1 stream", 64, ways=("generate", "compiled")),
    Ask("streams", "64 streams of 256 + 128 tokens", 128, batch=64, ways=("generate_batch",)),
    Ask("prefill", "prefill", 2048, ways=("generate",)),
)
LEVEL_ASKS = (
    Ask("decode", "1 stream", 64),
    Ask("decode", "8 streams", 64, batch=8),
    Ask("decode", "32 streams", 64, batch=32),
    Ask("decode", "64 streams", 64, batch=64),
    Ask("prefill", "prefill", 2048),
)


def command(
    *,
    shape: Annotated[str, typer.Option(help="8b, 1b, 450m, 110m or tiny.")] = "8b",
    levels: Annotated[
        str, typer.Option(help="Comma-separated; the first is what others are to.")
    ] = ("bf16,fp8,int8,int4-rtn-g128"),
    peers: Annotated[
        str, typer.Option(help="Ways of transformers, comma-separated; - for none.")
    ] = (",".join(WAYS)),
    runs: Annotated[int, typer.Option(min=1, max=100, help="Alternating runs; medians.")] = 5,
    peak: Annotated[
        float, typer.Option(min=1, help="TFLOP/s in bf16 that prefill is compared with.")
    ] = 989.0,
    json_out: opt.JsonOut = None,
    markdown_out: MarkdownOut = None,
) -> None:
    """Tokens/s on a CUDA device against transformers' generate, compiled and generate_batch."""
    if shape not in GPU_SHAPES:
        raise BadInput(f"--shape {shape}: not one of {', '.join(GPU_SHAPES)}")
    chosen = [name.strip() for name in levels.split(",") if name.strip()]
    if not chosen:
        raise BadInput("--levels: names no level")
    ways = [] if peers == "-" else [name.strip() for name in peers.split(",")]
    for way in ways:
        if way not in WAYS:
            raise BadInput(f"--peers {way}: not one of {', '.join(WAYS)}")

    def measured() -> dict[str, Any]:
        return measure(GPU_SHAPES[shape], chosen, ways, runs, peak) | {"shape": shape}

    deliver("On a GPU", measured, show, json_out, markdown_out)


def measure(
    shape: Shape, levels: Sequence[str], ways: Sequence[str], runs: int, peak: float
) -> dict[str, Any]:
    """Our first level against transformers, then all levels against the first.

    Raises:
        EngineError: there is no CUDA device, or our own engine gave no number.
    """
    setup = {"config": shape.config(), "tensors": [[n, list(s)] for n, s in shape.tensors()]}
    with ExitStack() as stack:
        ours = stack.enter_context(Child(OURS, [sys.executable, "-m", "gateway.engine.cuda.pace"]))
        versions = dict(ours.ask(setup, _LOAD_TIMEOUT)["versions"])
        peer = _peer(stack, setup, ways, versions)
        sizes = _load(ours, levels, peer.skipped)
        present = list(sizes)
        rows = [_against(ours, levels[0], peer, fitted(ask, shape), runs) for ask in ASKS]
        compared = [_levels(ours, present, fitted(ask, shape), runs) for ask in LEVEL_ASKS]
    for row in (*rows, *compared):
        if row["kind"] == "prefill":
            row["mfu"] = {
                name: rate * _flops(shape, row["tokens"]) / row["tokens"] / peak / 1e12
                for name, rate in row["median"].items()
            }
    return {
        "rows": rows,
        "levels": compared,
        "bytes": sizes,
        "peak_tflops": peak,
        "skipped": sorted(set(peer.skipped)),
        "versions": versions,
    }


@dataclass(frozen=True, slots=True)
class _Peer:
    """transformers in a child, the ways that are wanted, and where reasons for none go."""

    child: Child | None
    ways: Sequence[str]
    skipped: list[str]


def fitted(ask: Ask, shape: Shape) -> Ask:
    """The ask with a prompt that the context holds, and its length in the title of a prefill."""
    if ask.kind != "prefill":
        return replace(ask, prompt=min(ask.prompt, shape.context - ask.tokens - 1))
    tokens = min(ask.tokens, shape.context - 1)
    return replace(ask, tokens=tokens, title=f"prefill {tokens:,}")


def _peer(
    stack: ExitStack, setup: Mapping[str, Any], ways: Sequence[str], versions: dict[str, str]
) -> _Peer:
    found = _Peer(None, ways, [])
    if not ways:
        return found
    command = [sys.executable, str(_PEERS / "answers.py"), str(_PEERS / "gpu_worker.py")]
    child = stack.enter_context(Child("transformers", command))
    try:
        versions |= child.ask(setup, _LOAD_TIMEOUT)["versions"]
    except EngineError as error:
        found.skipped.append(str(error))
        return found
    return replace(found, child=child)


def _load(ours: Child, levels: Sequence[str], skipped: list[str]) -> dict[str, int]:
    """Bytes on the device of every level that could be loaded; the first must be."""
    sizes = {}
    for level in levels:
        try:
            answer = ours.ask({"kind": "load", "level": level}, _LOAD_TIMEOUT)
        except EngineError as error:
            if level == levels[0]:
                raise
            skipped.append(f"{level}: {error}")
        else:
            sizes[level] = int(answer["bytes"])
    return sizes


def _rate(child: Child, ask: Ask, extra: dict[str, str]) -> Callable[[], float]:
    def measure_once() -> float:
        answer = child.ask(ask.message() | extra, _TIMEOUT)
        return float(answer["tokens"]) / float(answer["seconds"])

    return measure_once


def _against(ours: Child, level: str, peer: _Peer, ask: Ask, runs: int) -> dict[str, Any]:
    """One measurement of our level and of every way of transformers that gives a number."""
    measures = {OURS: _rate(ours, ask, {"level": level})}
    measures[OURS]()  # the first of each is thrown away
    for way in ask.ways:
        if peer.child is None or way not in peer.ways:
            continue
        rate = _rate(peer.child, ask, {"way": way})
        try:
            rate()
        except EngineError as error:
            peer.skipped.append(f"{way}, {ask.title}: {error}")
        else:
            measures[f"transformers {way}"] = rate
    return _row(ask, in_turn(measures, runs, warm=True), OURS)


def _levels(ours: Child, levels: Sequence[str], ask: Ask, runs: int) -> dict[str, Any]:
    """All levels in turn; ratios of each to the first."""
    measures = {level: _rate(ours, ask, {"level": level}) for level in levels}
    return _row(ask, in_turn(measures, runs), levels[0])


def _row(ask: Ask, found: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    return {"kind": ask.kind, "ask": ask.title, "tokens": ask.tokens, **versus(found, ours)}


def _flops(shape: Shape, tokens: int) -> float:
    """Of a prompt's matrix products: linears, causal attention, and the head's for one token."""
    linears = sum(
        size[0] * size[1] for name, size in shape.tensors() if name.endswith("_proj.weight")
    )
    attention = shape.layers * 2.0 * tokens**2 * shape.heads * shape.head_size
    return 2.0 * tokens * linears + attention + 2.0 * shape.vocab * shape.hidden


def show(report: Mapping[str, Any]) -> list[str]:
    """Against transformers; levels against the first; shares of the peak in prefill."""
    tables = [_table(report["rows"], lambda ratio: f"ours {ratio:.2f}×")]
    tables.append(_table(report["levels"], lambda ratio: f"{1 / ratio:.2f}×"))
    sizes = ", ".join(f"{level} {count / 1e9:.1f} GB" for level, count in report["bytes"].items())
    peak = report["peak_tflops"]
    return [*tables, f"Tokens/s; the peak is {peak:g} TFLOP/s. Weights on the device: {sizes}.\n"]


def _table(rows: Sequence[Mapping[str, Any]], compared: Callable[[float], str]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["median"]))

    def cell(row: Mapping[str, Any], name: str) -> str:
        text = markdown.number(row["median"].get(name))
        if name in row["ratios"]:
            text += f" ({compared(row['ratios'][name])})"
        if name in row.get("mfu", {}):
            text += f", {100 * row['mfu'][name]:.0f} % of the peak"
        return text

    body = [[row["ask"], *(cell(row, name) for name in names)] for row in rows]
    return markdown.table(["", *names], body)
