"""`compare streams`: tokens per second of servers under 1, 4, 8 … callers, over HTTP.

The same client, the same prompts, answers of one length; servers stay up and are asked in turn.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from loadtest import workloads
from loadtest.client import Client, Outcome
from loadtest.compare import markdown
from loadtest.compare.rounds import in_turn, versus
from loadtest.mix import Goals, Lengths, single_class
from loadtest.peers import servers
from loadtest.peers.child import EngineError, Skipped
from loadtest.peers.engines import OURS, Case
from loadtest.peers.place import Place
from loadtest.peers.servers import PEER_SERVERS, Server
from loadtest.runner import Bounds, Run, run_closed

_WAVES = 2  # answers of each caller in a run
_PROMPT = 16
_BOUNDS = Bounds(duration=600.0, drain=60.0)


def measure(
    place: Place,
    cases: Iterable[Case],
    streams: Sequence[int],
    peers: Sequence[str],
    *,
    tokens: int,
    runs: int,
) -> dict[str, Any]:
    """Every number of streams of every case, servers in turn.

    Raises:
        EngineError: our server did not start or lost a request.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for case in cases:
        with up(place, case, peers, skipped) as present:
            for count in streams:
                rows.append(_row(case, present, count, tokens, runs))
    return {"rows": rows, "skipped": sorted(set(skipped))}


@contextmanager
def up(
    place: Place, case: Case, peers: Sequence[str], skipped: list[str]
) -> Iterator[list[Server]]:
    """Our server and the peers' that are there; ended at the end."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ours = Server(servers.pressgate(place, case, [case.level], folder))
        stack.callback(ours.close)
        servers.settle(ours, [case.level], case.shape)
        present = [ours]
        for name in peers:
            try:
                server = Server(PEER_SERVERS[name](place, case))
            except Skipped as reason:
                skipped.append(str(reason))
            except EngineError as error:
                skipped.append(f"{name} at {case.bits} bits failed: {error}")
            else:
                stack.callback(server.close)
                present.append(server)
        yield present


def _row(
    case: Case, present: Sequence[Server], count: int, tokens: int, runs: int
) -> dict[str, Any]:
    firsts: dict[str, list[float]] = {server.name: [] for server in present}

    def rate(server: Server) -> float:
        seed = len(firsts[server.name])  # new prompts in every run, the same for everyone
        run = play(server, callers=count, requests=count * _WAVES, tokens=tokens, seed=seed)
        firsts[server.name].append(statistics.median(_first(o) for o in run.outcomes))
        return sum(outcome.tokens for outcome in run.outcomes) / run.elapsed

    found = in_turn({server.name: partial(rate, server) for server in present}, runs)
    return {
        "shape": case.shape,
        "bits": case.bits,
        "streams": count,
        "forms": {server.name: server.what for server in present},
        "ttft_ms": {name: 1000 * statistics.median(v[1:]) for name, v in firsts.items()},
        **versus(found, OURS),
    }


def play(server: Server, *, callers: int, requests: int, tokens: int, seed: int = 0) -> Run:
    """`requests` answers of `tokens` tokens for so many callers.

    Raises:
        EngineError: an answer failed or was cut short.
    """
    rng = np.random.default_rng(seed)
    size = Lengths.model_validate(_PROMPT)
    lengths = workloads.DefaultLengths(size, Lengths.model_validate(tokens))
    prompts = workloads.TextPrompts.from_words(rng)
    mix = single_class(Goals())
    planned = workloads.plan(workloads.closed(requests), mix, prompts, lengths, rng)

    async def sent() -> Run:
        async with Client(server.target) as client:
            return await run_closed(client, planned, callers, _BOUNDS, lambda _outcome: None)

    run = asyncio.run(sent())
    for outcome in run.outcomes:
        if outcome.status != "ok":
            raise EngineError(f"{server.name}: {outcome.status}: {outcome.error}")
        if outcome.tokens < tokens:
            raise EngineError(f"{server.name}: {outcome.tokens} tokens instead of {tokens}")
    return run


def _first(outcome: Outcome) -> float:
    assert outcome.ttft is not None, "an answer that ended well has a first token"
    return outcome.ttft


def show(report: Mapping[str, Any]) -> list[str]:
    """Tokens/s, time to first token and ratios."""
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["median"]))
    others = [name for name in names if name != OURS]
    head = ["shape", "bits", "streams"]
    head += [f"{name} tok/s (TTFT ms)" for name in names] + [f"÷ {name}" for name in others]
    body = [
        [
            row["shape"],
            str(row["bits"]),
            str(row["streams"]),
            *(_both(row, name) for name in names),
            *(markdown.ratio(row["ratios"].get(name)) for name in others),
        ]
        for row in rows
    ]
    return [markdown.table(head, body, 2)]


def _both(row: Mapping[str, Any], name: str) -> str:
    if name not in row["median"]:
        return markdown.NOTHING
    return f"{row['median'][name]:,.0f} ({row['ttft_ms'][name]:,.0f})"
