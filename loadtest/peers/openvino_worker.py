"""Times OpenVINO GenAI on demand. Runs in the peers' own Python: `python openvino_worker.py`.

The first JSON line names the folder of the converted model, the threads and the properties; then a
question a line (`decode` with batch, prompt and tokens; `prefill` with tokens), answered in JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np


class Worker:
    """One model, compiled."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._ov: Any = import_module("openvino")
        self._genai: Any = import_module("openvino_genai")
        properties = {
            "INFERENCE_NUM_THREADS": setup["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            **setup["properties"],
        }
        self._pipe = self._genai.LLMPipeline(setup["model"], "CPU", **properties)
        self._vocab = int(setup["vocab"])
        self._rng = np.random.default_rng(1)

    def decode(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds of the steps after the prompts were computed."""
        tokens = ask["tokens"]
        began = time.perf_counter()
        first = self._generate(ask["batch"], ask["prompt"], tokens + 1)
        return {"seconds": time.perf_counter() - began - first, "tokens": ask["batch"] * tokens}

    def prefill(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        began = time.perf_counter()
        self._generate(1, ask["tokens"], 1)
        return {"seconds": time.perf_counter() - began, "tokens": ask["tokens"]}

    def _generate(self, batch: int, prompt: int, new: int) -> float:
        """Generate greedily on random prompts; the seconds to the first tokens."""
        ids = self._rng.integers(3, self._vocab, (batch, prompt), dtype=np.int64)
        inputs = self._genai.TokenizedInputs(
            self._ov.Tensor(ids), self._ov.Tensor(np.ones_like(ids))
        )
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = new, False, True
        result = self._pipe.generate(inputs, config)
        if any(len(row) != new for row in result.tokens):
            raise ValueError(f"{[len(row) for row in result.tokens]} tokens instead of {new}")
        return float(result.perf_metrics.get_ttft().mean) / 1000


def main() -> None:
    """Answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker: Worker | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if worker is None:
                worker = Worker(ask)
                version = import_module("openvino_genai").__version__
                answer: dict[str, Any] = {"versions": {"openvino-genai": version}}
            else:
                answer = getattr(worker, ask["kind"])(ask)
        except Exception as error:  # whoever asked must hear of it, whatever it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
