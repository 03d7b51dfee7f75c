"""A simulated host in front of which the real queue stands: `python -m tests.policy.queue_sim`.

Slots of a few levels, Poisson arrivals, a fake clock: no sleeping, no asyncio. With `--requests
1000000` (the default of the command) it plays a million requests at one, three and ten times what
the host can do, and prints goodput, attainment and waits. The tests play fewer.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.policy.queue import Queue, QueueFull, Waiting

LEVELS = ("bf16", "int8", "int4")
SLOTS = 8
MEAN_S = 1.0  # a request holds a slot so long, on average
SPREAD = 0.25  # standard deviation of the log of that
UPPER = math.exp(1.282 * SPREAD)  # nine of ten take at most so many times the expected
KEYS = ("a", "b", "c", "d")
GREEDY = 0.7  # share of all requests that come with the first key
WAIT_S = 60.0  # callers without a deadline hang up after that


@dataclass(slots=True, eq=False)
class Request:
    entry: Waiting
    takes_s: float
    deadline: float


@dataclass(slots=True)
class Report:
    """`goodput`: promises kept per second of simulated time and slot, in units of capacity."""

    load: float
    requests: int
    seconds: float = 0.0
    kept: int = 0
    broken: int = 0
    late_refusals: int = 0
    gave_up: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    longest_wait: dict[str, float] = field(default_factory=dict)
    started_by_key: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        return self.kept * MEAN_S / (self.seconds * SLOTS * len(LEVELS))

    @property
    def attainment(self) -> float:
        """Of requests whose promise was accepted, those that were answered in time."""
        accepted = self.kept + self.broken + self.late_refusals
        return self.kept / accepted if accepted else 1.0


class Host:
    """Levels with slots and the queue before them, driven by arrivals and endings."""

    def __init__(self, report: Report, most: int = 256) -> None:
        self.report = report
        self.queue = Queue(most, most)
        self.free = dict.fromkeys(LEVELS, SLOTS)
        self.running: list[tuple[float, int, Request]] = []
        self.requests: dict[int, Request] = {}
        self.number = 0

    def arrive(self, request: Request, now: float) -> None:
        self.advance(now)
        entry, level = request.entry, request.entry.level
        if self.free[level] and self.queue.head(level, now) is None:
            self.queue.started(entry, now)
            self.begin(request, now)
            return
        if entry.promised and not self.queue.fits(entry, now, MEAN_S / SLOTS):
            self.report.counts["refused early"] += 1
            return
        try:
            self.queue.push(entry, now)
        except QueueFull:
            self.report.counts["queue full"] += 1
            return
        self.requests[entry.number] = request

    def advance(self, now: float) -> None:
        """Everything that ends before `now`."""
        while self.running and self.running[0][0] <= now:
            at, _, request = heapq.heappop(self.running)
            level = request.entry.level
            self.free[level] += 1
            if request.entry.promised:
                if at <= request.deadline:
                    self.report.kept += 1
                else:
                    self.report.broken += 1
            self.expire(at)
            while self.free[level] and (head := self.queue.head(level, at)) is not None:
                self.queue.start(head, at)
                self.begin(self.requests.pop(head.number), at)
        self.expire(now)

    def expire(self, now: float) -> None:
        for entry in self.queue.expired(now):
            del self.requests[entry.number]
            self.report.late_refusals += 1

    def begin(self, request: Request, now: float) -> None:
        entry, report = request.entry, self.report
        self.free[entry.level] -= 1
        assert self.free[entry.level] >= 0
        lane = f"{'promised' if entry.promised else 'best effort'} {entry.priority}"
        report.counts[lane] += 1
        report.longest_wait[lane] = max(report.longest_wait.get(lane, 0.0), now - entry.arrived)
        report.started_by_key[entry.key] += 1
        self.number += 1
        heapq.heappush(self.running, (now + request.takes_s, self.number, request))


def arrivals(
    load: float, count: int, seed: int, promised: float
) -> Iterator[tuple[float, Request]]:
    rng = random.Random(seed)
    now, rate = 0.0, load * SLOTS * len(LEVELS) / MEAN_S
    for _ in range(count):
        now += rng.expovariate(rate)
        expected = rng.uniform(0.5, 1.5) * MEAN_S
        deadline = now + expected * UPPER + rng.uniform(0.0, 3.0)
        start_by = deadline - expected * UPPER if rng.random() < promised else math.inf
        entry = Waiting(
            key=KEYS[0] if rng.random() < GREEDY else rng.choice(KEYS[1:]),
            level=rng.choice(LEVELS),
            priority=rng.choice((3, 5, 5, 5, 8)),
            arrived=now,
            start_by=start_by,
            hold_s=expected,
        )
        yield now, Request(entry, expected * rng.lognormvariate(0.0, SPREAD), deadline)


def simulate(load: float, count: int, *, seed: int = 0, promised: float = 0.7) -> Report:
    report = Report(load, count)
    host = Host(report)
    now = 0.0
    for now, request in arrivals(load, count, seed, promised):
        host.arrive(request, now)
    report.seconds = now
    host.advance(math.inf)
    return report


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=1_000_000)
    asked = options.parse_args()
    for load in (1.0, 3.0, 10.0):
        began = time.perf_counter()
        report = simulate(load, asked.requests // 3)
        took = time.perf_counter() - began
        print(
            f"{load:4.0f}x  {report.requests} requests in {took:.1f} s: goodput "
            f"{report.goodput:.3f} of capacity, attainment {report.attainment:.4f} "
            f"(too slow {report.broken}, refused late {report.late_refusals}), "
            f"{dict(sorted(report.counts.items()))}, longest waits "
            f"{ {lane: round(wait, 1) for lane, wait in sorted(report.longest_wait.items())} }"
        )


if __name__ == "__main__":
    main()
