"""The memory budget, measured from outside: what the process gains by serving stays under it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.gateway_process import GatewayProcess

pytestmark = pytest.mark.slow

MIB = 2**20
BUDGET = 130 * MIB  # 97 MiB for weights: bf16 (35 MB) and fp32 (69 MB) do not fit together
SCRATCH = 64 * MIB  # activations and allocator slack, which the budget does not cover


def test_serving_levels_in_turn_stays_within_the_budget(tmp_path: Path) -> None:
    config = {"memory_budget": BUDGET, "levels": ["fp32", "int8"], "threads": 1}
    with GatewayProcess(tmp_path, config) as gateway:
        gateway.complete(model="docs-17m@bf16")  # first use of every library
        resident = psutil.Process(gateway.pid).memory_info().rss
        base = resident - gateway.level("bf16")["resident_bytes"]
        peak = 0
        for level in ("fp32", "int8", "bf16", "fp32", "bf16"):
            with ThreadPoolExecutor(6) as threads:
                prompts = [f"Page {index}: the function returns" for index in range(6)]
                list(
                    threads.map(
                        lambda prompt, level=level: gateway.complete(
                            model=f"docs-17m@{level}", prompt=prompt, max_tokens=48
                        ),
                        prompts,
                    )
                )
            peak = max(peak, psutil.Process(gateway.pid).memory_info().rss - base)
            rows = gateway.get("/v1/levels")["data"]
            ready = {row["level"]: row["resident_bytes"] for row in rows if row["state"] == "ready"}
            assert level in ready
            assert sum(ready.values()) <= BUDGET * 0.75
        assert not {"bf16", "fp32"} <= ready.keys(), "they cannot both have been kept"
        assert peak <= BUDGET + SCRATCH, f"{peak / MIB:.0f} MiB"
