"""Times transformers' own `generate` on demand (see `answers`).

Its setup names the checkpoint, the threads and the dtype. Static batches, its default cache, no
compilation.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any


class Worker:
    """One model, loaded."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.versions = {name: version(name) for name in ("torch", "transformers")}
        torch.set_num_threads(setup["threads"])
        self._torch = torch
        dtype = getattr(torch, setup["dtype"])
        model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=dtype)
        self._model: Any = model.eval()
        self._vocab = int(setup["vocab"])
        self._seed = torch.Generator().manual_seed(1)

    def decode(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds of the steps after the prompts were computed."""
        ids = self._prompts(ask["batch"], ask["prompt"])
        moments: list[float] = []

        class Clock:
            """A streamer: told of the prompt and then of every token."""

            def put(self, _value: Any) -> None:
                moments.append(time.perf_counter())

            def end(self) -> None:
                pass

        # A streamer takes one sequence only; larger batches are timed without one, twice.
        if ask["batch"] == 1:
            self._generate(ids, ask["tokens"] + 1, Clock())
            seconds = moments[-1] - moments[1]
        else:
            seconds = self._timed(ids, ask["tokens"] + 1) - self._timed(ids, 1)
        return {"seconds": seconds, "tokens": ask["batch"] * ask["tokens"]}

    def prefill(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        seconds = self._timed(self._prompts(1, ask["tokens"]), 1)
        return {"seconds": seconds, "tokens": ask["tokens"]}

    def _timed(self, ids: Any, new: int) -> float:
        began = time.perf_counter()
        self._generate(ids, new, None)
        return time.perf_counter() - began

    def _prompts(self, batch: int, length: int) -> Any:
        return self._torch.randint(3, self._vocab, (batch, length), generator=self._seed)

    def _generate(self, ids: Any, new: int, streamer: Any) -> None:
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
