"""CUDA graphs of one step by batch size: captured when they are needed, replayed from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Graphs:
    """Runs `step(rows)`: the first time for a size as it is, which also compiles what it needs;
    the second time it is captured; then replayed.

    A step reads and writes the same addresses every time. Capturing takes about as long as
    launching the step once, so it needs no time of its own. The graphs share one memory pool: they
    run one after the other, and what one leaves is read before the next runs.
    """

    def __init__(self, step: Callable[[int], Tensor], *, enabled: bool) -> None:
        self._step = step
        self.enabled = enabled
        self._seen: set[int] = set()
        self._ready: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    @property
    def sizes(self) -> list[int]:
        """Captured so far."""
        return sorted(self._ready)

    def run(self, rows: int) -> Tensor:
        """The step's result; the next run of any size may overwrite it."""
        if self.enabled and rows in self._seen and rows not in self._ready:
            self._capture(rows)
        if rows in self._ready:
            graph, result = self._ready[rows]
            graph.replay()
            return result
        self._seen.add(rows)
        return self._step(rows)

    def drop(self) -> None:
        """Forget all graphs: the addresses changed."""
        self._ready.clear()
        self._pool = None

    def _capture(self, rows: int) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        main: Any = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        try:
            # torch.cuda.graph would collect garbage and empty the allocator first. Thread-local:
            # the loader may allocate meanwhile.
            with torch.cuda.stream(side):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = self._step(rows)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            log.warning("a step cannot be captured and is launched instead: %s", error)
            self.enabled = False
            return
        main.wait_stream(side)
        self._ready[rows] = (graph, result)
