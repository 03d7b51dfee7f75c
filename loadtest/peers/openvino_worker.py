"""Times OpenVINO GenAI on demand, in the peers' own Python (see `answers`).

Its setup names the folder of the converted model, the threads and the properties.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import numpy as np


class Worker:
    """One model, compiled."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._ov: Any = import_module("openvino")
        self._genai: Any = import_module("openvino_genai")
        self.versions = {"openvino-genai": self._genai.__version__}
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
