"""Times transformers on a GPU on demand (see `answers`), in bf16.

Its setup has the model's config; the weights are random, made on the `device`. A question names the
way: `generate` (eager), `compiled` (static cache, compiled decoding) or `generate_batch`
(continuous batching).
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

_OTHERS = 0.5  # of the free memory is left to the engines beside it by continuous batching


class Worker:
    """One model on the device."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        device = setup.get("device", "cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        self.versions = {name: version(name) for name in ("torch", "transformers")}
        self._torch, self._device = torch, device
        self._share = float(setup.get("memory_share", 1 - _OTHERS))
        values = dict(setup["config"])
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model: Any = model.eval()
        self._vocab = int(values["vocab_size"])
        self._seed = torch.Generator().manual_seed(1)
        self._cache: tuple[int, Any] | None = None

    def decode(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one stream's steps after the first token."""
        if ask["batch"] != 1:
            raise ValueError(f"decode of {ask['batch']} streams: a streamer takes one")
        moments: list[float] = []

        class Clock:
            """A streamer: told of the prompt and then of every token."""

            def put(self, _value: Any) -> None:
                moments.append(time.perf_counter())

            def end(self) -> None:
                pass

        self._generate(self._ids(1, ask["prompt"]), ask["tokens"] + 1, ask["way"], Clock())
        return {"seconds": moments[-1] - moments[1], "tokens": ask["tokens"]}

    def streams(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds and tokens of whole answers, prompts included."""
        ids = self._ids(ask["batch"], ask["prompt"])
        began = time.perf_counter()
        if ask["way"] == "generate_batch":
            self._batched(ids.tolist(), ask["tokens"])
        else:
            self._generate(ids, ask["tokens"], ask["way"], None)
        return {"seconds": time.perf_counter() - began, "tokens": ask["batch"] * ask["tokens"]}

    def prefill(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        ids = self._ids(1, ask["tokens"])
        began = time.perf_counter()
        self._generate(ids, 1, ask["way"], None)
        return {"seconds": time.perf_counter() - began, "tokens": ask["tokens"]}

    def _ids(self, batch: int, length: int) -> Any:
        return self._torch.randint(3, self._vocab, (batch, length), generator=self._seed)

    def _generate(self, ids: Any, new: int, way: str, streamer: Any) -> None:
        """`generate`, to its end: the tokens are read on the host."""
        ids = ids.to(self._device)
        with self._torch.no_grad() if way == "compiled" else self._torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
                past_key_values=self._static(ids.shape[1] + new) if way == "compiled" else None,
            )
        found.tolist()

    def _static(self, length: int) -> Any:
        """An empty static cache, with which `generate` compiles its steps; the same one while it
        is long enough, since another one's addresses are captured anew."""
        from transformers import StaticCache

        if self._cache is None or self._cache[0] < length:
            self._cache = length, StaticCache(config=self._model.config, max_cache_len=length)
        self._cache[1].reset()
        return self._cache[1]

    def _batched(self, prompts: list[list[int]], new: int) -> None:
        """`generate_batch`; its cache outlives the call. Its thread may not meet tensors that were
        made in inference mode, and an error in it is told only in the answers."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        found = self._model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(
                max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=self._share),
            persistent_manager=True,
        )
        errors = [output.error for output in found.values() if output.error is not None]
        made = sum(len(output.generated_tokens) for output in found.values())
        if errors or made != len(prompts) * new:
            why = errors[0] if errors else "its thread ended"
            raise RuntimeError(f"generate_batch made {made} of {len(prompts) * new} tokens: {why}")
