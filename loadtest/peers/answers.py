"""Answers questions about an engine in JSON lines: `python answers.py WORKER.py`.

The worker's file, which needs nothing but what it times, has a class `Worker`: made of the first
line, with `versions` of what it runs, and a method for every `kind` of question (see `Timed`). A
failure is answered as `{"error": text}`. Standard library only: it runs in other Pythons too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

KINDS = ("decode", "prefill", "streams")


class Timed(Protocol):
    """One loaded engine; every question is answered with `seconds` and `tokens`.

    `decode`: `tokens` steps of `batch` sequences after prompts of `prompt` tokens; `prefill`: a
    prompt of `tokens`, to its first token; `streams`: whole answers, prompts included. A worker has
    those that it can do.
    """

    versions: Mapping[str, str]


def main() -> None:
    """Answer until standard input ends."""
    make = _load(Path(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker: Timed | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if worker is None:
                worker = make(ask)
                answer: dict[str, Any] = {"versions": worker.versions}
            else:
                answer = _answer(worker, ask)
        except Exception as error:  # whoever asked must hear of it, whatever it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _answer(worker: Timed, ask: Mapping[str, Any]) -> dict[str, Any]:
    act = getattr(worker, ask["kind"], None) if ask["kind"] in KINDS else None
    if act is None:
        raise ValueError(f"kind {ask['kind']!r}: this engine cannot be asked for it")
    return dict(act(ask))


def _load(path: Path) -> Callable[[Mapping[str, Any]], Timed]:
    """The class `Worker` of a file, wherever it lies."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a worker is a Python file"
    assert spec.loader is not None, "a worker is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[Mapping[str, Any]], Timed] = module.Worker
    return make


if __name__ == "__main__":
    main()
