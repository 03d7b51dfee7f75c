"""Independent pieces of work on threads, with results that do not depend on how many there are.

Inside a `Lanes` every torch operation runs on one thread: how a product is split over threads can
change its last bits, so the pieces are what runs side by side, never the inside of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """A few threads. A context manager; outside of it, and with one thread, work runs in place.

    Args:
        threads: how many pieces run at once; None is what torch would use.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = max(1, torch.get_num_threads() if threads is None else threads)
        self._pool: ThreadPoolExecutor | None = None
        self._inner = torch.get_num_threads()

    def __enter__(self) -> Lanes:
        self._inner = torch.get_num_threads()
        torch.set_num_threads(1)
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, "compress")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        torch.set_num_threads(self._inner)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """`work` of every item, in order; at most one piece more than threads is held.

        The first error ends it: pieces that have not begun never do. Close the iterator when it is
        left early.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(work, item))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
