"""`compare switch`: does changing the level with every request cost anything?

One caller, one server, all levels loaded. In turn: a block of requests that goes round the levels,
and for every level a block that stays with it. As all answers are equally long, the blocks that
stay take together as long as the one that changes, where changing is free.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from loadtest.compare import markdown
from loadtest.compare.rounds import in_turn
from loadtest.compare.streams import play
from loadtest.peers import servers
from loadtest.peers.engines import Case
from loadtest.peers.place import Place
from loadtest.peers.servers import Server


def measure(
    place: Place, case: Case, levels: Sequence[str], *, tokens: int, each: int, runs: int
) -> dict[str, Any]:
    """Seconds of the blocks by level and of the mixed one, and how much longer the mixed one takes.

    Args:
        each: requests of a level in a block.
    Raises:
        EngineError: the server did not start or lost a request.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        server = Server(servers.pressgate(place, case, levels, folder))
        stack.callback(server.close)
        servers.settle(server, levels, case.shape)

        seeds = count()

        def seconds(order: Sequence[str]) -> float:
            names = [f"{case.shape}@{level}" for level in order]
            return sum(_one(server, name, tokens, next(seeds)) for name in names)

        blocks = {level: partial(seconds, [level] * each) for level in levels}
        found = in_turn(blocks | {"mixed": partial(seconds, list(levels) * each)}, runs)
    return {"rows": summarize(case, found, levels, tokens * each)}


def _one(server: Server, model: str, tokens: int, seed: int) -> float:
    """Seconds of one answer, from sending to its last token."""
    server.target = replace(server.target, model=model)
    outcome = play(server, callers=1, requests=1, tokens=tokens, seed=seed).outcomes[0]
    return outcome.finished - outcome.sent


def summarize(
    case: Case, found: Mapping[str, Sequence[float]], levels: Sequence[str], tokens: int
) -> list[dict[str, Any]]:
    """One row: tokens/s by level and mixed (medians), and the median over rounds of mixed ÷ alone,
    in seconds."""
    alone = [sum(values) for values in zip(*(found[level] for level in levels), strict=True)]
    slower = [mixed / apart for mixed, apart in zip(found["mixed"], alone, strict=True)]
    rates = {level: tokens / statistics.median(found[level]) for level in levels}
    return [
        {
            "shape": case.shape,
            "runs": {name: list(values) for name, values in found.items()},
            "tokens_per_s": rates,
            "alone": len(levels) * tokens / statistics.median(alone),
            "mixed": len(levels) * tokens / statistics.median(found["mixed"]),
            "slower": statistics.median(slower) - 1,
        }
    ]


def show(report: Mapping[str, Any]) -> list[str]:
    """Tokens/s of each level, of all one after the other, and interleaved."""
    row = report["rows"][0]
    levels = list(row["tokens_per_s"])
    head = ["shape", *levels, "one after the other", "interleaved", "slower by"]
    rates = [*row["tokens_per_s"].values(), row["alone"], row["mixed"]]
    cells = [row["shape"], *(markdown.number(rate, 1) for rate in rates)]
    return [markdown.table(head, [[*cells, f"**{100 * row['slower']:.1f} %**"]])]
