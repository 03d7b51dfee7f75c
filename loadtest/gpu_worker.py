"""Times transformers on a GPU on demand: `python gpu_worker.py`, JSON lines as the other workers.

The first line is the model's config; its weights are random, made on the device. A question names
the way: `generate` (eager), `compiled` (static cache, compiled decoding) or `generate_batch`
(continuous batching).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Worker:
    """One model in bf16 on the device."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        self._torch = torch
        values = dict(setup["config"])
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model: Any = model.eval()
        self._vocab = int(values["vocab_size"])
        self._seed = torch.Generator().manual_seed(1)

    def decode(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds of the steps after the prompts were computed."""
        ids = self._ids(ask["batch"], ask["prompt"])
        seconds = self._timed(ids, ask["tokens"] + 1, ask["way"]) - self._timed(ids, 1, ask["way"])
        return {"seconds": seconds, "tokens": ask["batch"] * ask["tokens"]}

    def streams(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds and tokens of whole answers, prompts included."""
        ids = self._ids(ask["batch"], ask["prompt"])
        seconds = self._timed(ids, ask["tokens"], ask["way"])
        return {"seconds": seconds, "tokens": ask["batch"] * ask["tokens"]}

    def prefill(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        seconds = self._timed(self._ids(1, ask["tokens"]), 1, ask["way"])
        return {"seconds": seconds, "tokens": ask["tokens"]}

    def _ids(self, batch: int, length: int) -> Any:
        return self._torch.randint(3, self._vocab, (batch, length), generator=self._seed)

    def _timed(self, ids: Any, new: int, way: str) -> float:
        self._torch.cuda.synchronize()
        began = time.perf_counter()
        with self._torch.inference_mode():
            if way == "generate_batch":
                self._batched(ids.tolist(), new)
            else:
                self._static(ids.cuda(), new, way)
        self._torch.cuda.synchronize()
        return time.perf_counter() - began

    def _static(self, ids: Any, new: int, way: str) -> None:
        cache = {"cache_implementation": "static"} if way == "compiled" else {}
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **cache,
        )

    def _batched(self, prompts: list[list[int]], new: int) -> None:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1)
        found = self._model.generate_batch(inputs=prompts, generation_config=config)
        made = sum(len(output.generated_tokens) for output in found.values())
        if made != len(prompts) * new:
            raise RuntimeError(f"generate_batch made {made} of {len(prompts) * new} tokens")


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
                answer: dict[str, Any] = {"versions": _versions()}
            else:
                answer = getattr(worker, ask["kind"])(ask)
        except Exception as error:  # whoever asked must hear of it, whatever it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    main()
