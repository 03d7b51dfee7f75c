"""`python -m loadtest compare …`: side by side with other engines, one command a table.

Peers come from one folder (`python -m loadtest peers` fills it); those that are not there are
skipped, and the table says so. Exit status: 1 when our own side gave no number, 2 for bad input.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtest import options as opt
from loadtest.compare import decode, load, markdown, switch
from loadtest.compare import streams as compare_streams
from loadtest.machine import provenance
from loadtest.mix import BadInput
from loadtest.peers.child import EngineError
from loadtest.peers.engines import LEVELS, PEERS, Ask, Case
from loadtest.peers.place import DEFAULT, Place
from loadtest.peers.servers import PEER_SERVERS
from loadtest.shapes import check_name

app = typer.Typer(no_args_is_help=True, help=__doc__)

_MOST = 4096

Dir = Annotated[Path, typer.Option("--dir", help="Folder of the peers and their models.")]
Shapes = Annotated[str, typer.Option("--shape", help="Comma-separated: 110m, 450m.")]
Bits = Annotated[str, typer.Option(help="Comma-separated: 32, 16, 8, 4.")]
Runs = Annotated[int, typer.Option(min=1, max=100, help="Alternating runs; medians are shown.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Of every engine.")]
PeerNames = Annotated[str, typer.Option("--peers", help="Comma-separated; - for none.")]
LevelOf = Annotated[
    list[str] | None, typer.Option("--level", help="BITS=LEVEL: our level for those bits.")
]
MarkdownOut = Annotated[Path | None, typer.Option("--markdown", help="Write the tables here too.")]
ALL_PEERS = ",".join(PEERS)
ALL_SERVERS = ",".join(PEER_SERVERS)
SWITCHED = (LEVELS[16], "int8", LEVELS[8], LEVELS[4])


@app.command("decode")
def decode_command(
    *,
    shape: Shapes = "110m",
    bits: Bits = "16,8,4",
    batch: Annotated[str, typer.Option(help="Comma-separated batch sizes; - for none.")] = "1,8",
    prefill: Annotated[str, typer.Option(help="Comma-separated prompts; - for none.")] = "512",
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Decode steps.")] = 64,
    runs: Runs = 5,
    threads: Threads = 2,
    peers: PeerNames = ALL_PEERS,
    level: LevelOf = None,
    directory: Dir = DEFAULT,
    json_out: opt.JsonOut = None,
    markdown_out: MarkdownOut = None,
) -> None:
    """Tokens/s of the bare engines: decode by batch, and prefill, at equal bits."""
    asks = [Ask("decode", tokens, batch=n) for n in _numbers(batch, "--batch", 256)]
    asks += [Ask("prefill", n) for n in _numbers(prefill, "--prefill", 2000)]
    if not asks:
        raise BadInput("--batch, --prefill: nothing to measure")
    cases = _cases(shape, bits, level, threads)
    names = peer_names(peers, PEERS)
    place = Place(directory.expanduser())

    def measured() -> dict[str, Any]:
        return decode.measure(place, cases, asks, names, runs)

    deliver("Engines at equal bits", measured, decode.show, json_out, markdown_out)


@app.command("streams")
def streams_command(
    *,
    shape: Shapes = "110m",
    bits: Bits = "16,8,4",
    streams: Annotated[str, typer.Option(help="Comma-separated numbers of callers.")] = "1,4,8,16",
    tokens: Annotated[int, typer.Option(min=1, max=256, help="Of every answer.")] = 64,
    runs: Runs = 5,
    threads: Threads = 2,
    peers: PeerNames = ALL_SERVERS,
    level: LevelOf = None,
    directory: Dir = DEFAULT,
    json_out: opt.JsonOut = None,
    markdown_out: MarkdownOut = None,
) -> None:
    """Tokens/s and time to first token of servers under concurrent callers."""
    counts = _numbers(streams, "--streams", 16)
    if not counts:
        raise BadInput("--streams: nothing to measure")
    cases = _cases(shape, bits, level, threads)
    names = peer_names(peers, PEER_SERVERS)
    place = Place(directory.expanduser())

    def measured() -> dict[str, Any]:
        return compare_streams.measure(place, cases, counts, names, tokens=tokens, runs=runs)

    deliver(
        "Servers under concurrent callers", measured, compare_streams.show, json_out, markdown_out
    )


@app.command("switch")
def switch_command(
    *,
    shape: Annotated[str, typer.Option(help="110m or 450m.")] = "110m",
    levels: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SWITCHED),
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Of every answer.")] = 32,
    requests: Annotated[int, typer.Option(min=1, max=100, help="Of a level in a block.")] = 4,
    runs: Runs = 5,
    threads: Threads = 2,
    directory: Dir = DEFAULT,
    json_out: opt.JsonOut = None,
    markdown_out: MarkdownOut = None,
) -> None:
    """Another level with every request against the same levels one after the other."""
    names = [name.strip() for name in levels.split(",")]
    if len(names) < 2 or not all(names):
        raise BadInput(f"--levels {levels}: needs two levels or more")
    case = Case(check_name(shape, "--shape"), 16, names[0], threads)
    place = Place(directory.expanduser())

    def measured() -> dict[str, Any]:
        return switch.measure(place, case, names, tokens=tokens, each=requests, runs=runs)

    deliver("Levels in turn on one stream", measured, switch.show, json_out, markdown_out)


@app.command("load")
def load_command(
    *,
    shape: Shapes = "110m",
    levels: Annotated[str, typer.Option(help="Comma-separated.")] = f"{LEVELS[8]},{LEVELS[4]}",
    runs: Runs = 5,
    threads: Threads = 2,
    directory: Dir = DEFAULT,
    json_out: opt.JsonOut = None,
    markdown_out: MarkdownOut = None,
) -> None:
    """Loading a stored level against reading its bytes; first token; memory it takes."""
    shapes = [check_name(name.strip(), "--shape") for name in shape.split(",")]
    names = [name.strip() for name in levels.split(",")]
    if not all(names):
        raise BadInput(f"--levels {levels}: an empty name")
    cases = [Case(one, 0, name, threads) for one in shapes for name in names]
    place = Place(directory.expanduser())

    def measured() -> dict[str, Any]:
        return load.measure(place, cases, runs)

    deliver("Loading and memory", measured, load.show, json_out, markdown_out)


def deliver(
    title: str,
    measured: Callable[[], dict[str, Any]],
    show: Callable[[dict[str, Any]], list[str]],
    json_out: Path | None,
    markdown_out: Path | None,
) -> None:
    """Measure, then print the tables and write them where the flags say."""
    opt.check_writable(json_out, "--json")
    opt.check_writable(markdown_out, "--markdown")
    # A plain end, so that the servers and workers that were started are ended too.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    started = time.time()
    try:
        found = measured()
    except EngineError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    report = provenance(started)
    report["versions"] |= found.pop("versions", {})
    report |= found
    console = opt.deliver_json(report, json_out)
    text = markdown.document(title, report, show(report))
    if markdown_out is not None and str(markdown_out) != "-":
        markdown_out.write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cases(shape: str, bits: str, level: Sequence[str] | None, threads: int) -> list[Case]:
    levels = LEVELS | dict(_level_of(text) for text in level or ())
    shapes = [check_name(name.strip(), "--shape") for name in shape.split(",")]
    wanted = _numbers(bits, "--bits", 32)
    for number in wanted:
        if number not in LEVELS:
            raise BadInput(f"--bits {number}: not one of {', '.join(map(str, LEVELS))}")
    return [Case(name, number, levels[number], threads) for name in shapes for number in wanted]


def _level_of(text: str) -> tuple[int, str]:
    bits, _, name = text.partition("=")
    if not bits.isdecimal() or int(bits) not in LEVELS or not name:
        raise BadInput(f"--level {text}: not BITS=LEVEL, such as 4=int4-rtn-g128")
    return int(bits), name


def peer_names(text: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """The chosen peers. Raises: BadInput for one that is not known."""
    if text == "-":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise BadInput(f"--peers {name}: not one of {', '.join(known)}")
    return names


def _numbers(text: str, flag: str, most: int) -> list[int]:
    if text == "-":
        return []
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= most:
            raise BadInput(f"{flag} {text}: not a comma-separated list of numbers from 1 to {most}")
        found.append(int(part))
    return found
