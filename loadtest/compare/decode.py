"""`compare decode`: tokens per second of the bare engines at equal bits, batches and threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from loadtest.compare import markdown
from loadtest.compare.rounds import in_turn, versus
from loadtest.peers.child import EngineError, Skipped
from loadtest.peers.engines import OURS, PEERS, Ask, Case, Engine, open_pressgate
from loadtest.peers.place import Place


def measure(
    place: Place, cases: Iterable[Case], asks: Sequence[Ask], peers: Sequence[str], runs: int
) -> dict[str, Any]:
    """Every ask of every case, engines in turn.

    Returns:
        `rows` (one per case and ask), `skipped` reasons and `versions`.
    Raises:
        EngineError: our own engine gave no number.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    versions: dict[str, str] = {}
    for case in cases:
        with engines(place, case, peers, skipped) as present:
            for ask in asks:
                rows.append(_row(case, ask, present, runs))
            for engine in present:
                versions |= engine.versions
    return {"rows": rows, "skipped": sorted(set(skipped)), "versions": versions}


@contextmanager
def engines(
    place: Place, case: Case, peers: Sequence[str], skipped: list[str]
) -> Iterator[list[Engine]]:
    """Ours and the peers that are there, loaded; closed at the end. Reasons go to `skipped`."""
    with ExitStack() as stack:
        present = [open_pressgate(place, case)]
        stack.callback(present[0].close)
        for name in peers:
            try:
                engine = PEERS[name](place, case)
            except Skipped as reason:
                skipped.append(str(reason))
            except EngineError as error:
                skipped.append(f"{name} at {case.bits} bits failed: {error}")
            else:
                stack.callback(engine.close)
                present.append(engine)
        yield present


def _row(case: Case, ask: Ask, present: Sequence[Engine], runs: int) -> dict[str, Any]:
    found = in_turn({engine.name: partial(engine.rate, ask) for engine in present}, runs)
    return {
        "shape": case.shape,
        "bits": case.bits,
        "ask": ask.title,
        "forms": {engine.name: engine.what for engine in present},
        **versus(found, OURS),
    }


def show(report: Mapping[str, Any]) -> list[str]:
    """The ratio table and what each engine's weights were."""
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["median"]))
    head = ["shape", "bits", "tokens/s of", *names, "best peer", "ratio"]
    body = [
        [
            row["shape"],
            str(row["bits"]),
            row["ask"],
            *(markdown.number(row["median"].get(name)) for name in names),
            row["best"] or markdown.NOTHING,
            markdown.ratio(row["ratio"]),
        ]
        for row in rows
    ]
    forms = {row["bits"]: row["forms"] for row in rows}
    kinds = [
        [str(bits), *(forms[bits].get(name, markdown.NOTHING) for name in names)] for bits in forms
    ]
    return [markdown.table(head, body, 3), markdown.table(["bits", *names], kinds, len(names) + 1)]
