"""How long a look at the ladder and a decision take: `python -m tests.policy.time_decide`.

Drives the real pool over stand-in engines, some of them busy, as a request does. Not a test: times
depend on the machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from gateway.config import FakeModel, Model
from gateway.engine.base import Engine, GenerationRequest, SamplingParams
from gateway.policy.budget import Sla
from gateway.policy.decide import Ask, decide
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.pool import VariantPool

NAMES = tuple(
    f"int{bits}-{method}-g{group}"
    for bits in (4, 3, 2, 8)
    for method in ("rtn", "hqq", "gptq", "awq")
    for group in (32, 64, 128, 256)
)
READY = 17
ROUNDS = 3000
ASK = Ask("m", 100, 16, None, Sla(ttft_ms=5000, tpot_ms=400))
POLICY = Policy(name="interactive", max_ppl_ratio=1.1, build=False)


async def main() -> None:
    print("levels  busy   look µs p50/p99   decide µs p50/p99   both µs p50/p99")
    for levels, busy in ((1, 1), (10, 3), (50, 0), (50, 4), (50, READY)):
        looks, decisions = await measure(levels, busy)
        both = [look + decision for look, decision in zip(looks, decisions, strict=True)]
        columns = "   ".join(f"{shown(times):>16}" for times in (looks, decisions, both))
        print(f"{levels:6} {busy:5}  {columns}")


async def measure(levels: int, busy: int) -> tuple[list[float], list[float]]:
    """µs of every look and of every decision; each is followed by an observation, as served."""
    backend = FakeBackend(
        Model(id="m", fake=FakeModel(tpot_ms=20, build_seconds=0)), NAMES[: levels - 1]
    )
    pool = VariantPool([backend], memory_budget=10**11, max_jobs=100)
    predictor = Predictor()
    looks, decisions = [], []
    async with AsyncExitStack() as stack:
        stack.push_async_callback(pool.close)
        await pool.open()
        ready = [facts.level for facts in pool.snapshot("m").levels][: min(READY, levels)]
        for level in ready:
            await pool.warm("m", level)
        work = []
        for level in ready[:busy]:
            engine = await stack.enter_async_context(pool.lease("m", level, wait_s=5))
            work += [asyncio.create_task(generate(engine)) for _ in range(2)]
        await asyncio.sleep(0.3)
        for index in range(ROUNDS):
            began = time.perf_counter()
            snapshot = pool.glance("m")
            looked = time.perf_counter()
            decision = decide(ASK, POLICY, snapshot, predictor.predict)
            decided = time.perf_counter()
            looks.append(1e6 * (looked - began))
            decisions.append(1e6 * (decided - looked))
            if decision.predicted is not None and decision.level is not None:
                predictor.observe(
                    "m", decision.level, decision.predicted, ttft_ms=30.0, tpot_ms=20.0
                )
            if index % 10 == 0:
                await asyncio.sleep(0.001)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    return looks, decisions


async def generate(engine: Engine) -> None:
    request = GenerationRequest("r", tuple(range(100)), SamplingParams(max_tokens=4000))
    async for _ in engine.generate(request):
        pass


def shown(times: Sequence[float]) -> str:
    ordered = sorted(times)
    return f"{ordered[len(ordered) // 2]:.1f} / {ordered[int(0.99 * len(ordered))]:.1f}"


if __name__ == "__main__":
    asyncio.run(main())
