"""A process that times levels of a random model on a GPU, in turn with other engines.

`python -m gateway.engine.cuda.pace`: a setup as one JSON line on standard input, then a question a
line; a JSON object a line comes back (`{"error": text}` for what cannot be done). Weights are made
on the device from a list of shapes. It drives the engine core that serves, without HTTP.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from compressors.apply import compress_linear
from compressors.quantize.embed import solve
from compressors.recipe import Recipe
from compressors.tensor import LinearForm, StoredLinear
from gateway.engine.base import GenerationRequest, SamplingParams
from gateway.engine.core import Core, LocalOptions
from gateway.engine.job import Job
from gateway.engine.kernels.store import pack
from gateway.engine.model import VariantWeights, build_model
from gateway.engine.runners import settle
from gateway.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_KV_BYTES = 16 << 30
_STREAMS = 64
_CHUNK = 2048
_STD = 0.02
_DTYPE = torch.bfloat16
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


class Pace:
    """Levels of one random model on one engine core.

    Args:
        setup: `config` (transformers' JSON) and `tensors` ([[name, shape], …]).
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        self._config: dict[str, Any] = setup["config"]
        self._shapes = {name: tuple(shape) for name, shape in setup["tensors"]}
        self._seed = torch.Generator("cuda").manual_seed(0)
        self._prompts = torch.Generator().manual_seed(1)
        self._tokenizer = _tokenizer(self._config["vocab_size"])
        self._core = Core(
            LocalOptions(
                device="cuda",
                max_num_seqs=_STREAMS,
                prefill_chunk=_CHUNK,
                kv_bytes=_KV_BYTES,
                prefix_cache=False,
            )
        )

    def load(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Make a level and let it take requests; its bytes on the device."""
        model = build_model(self._weights(ask["level"]), device="cuda")
        model = settle(model, max_batch=_STREAMS)
        thin = model.decoder is not None
        self._core.attach(ask["level"], model, self._tokenizer)
        return {"bytes": model.resident_bytes, "thin": thin}

    def decode(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds and tokens of the steps after the last prompt was computed."""
        first, began, made = self._submit(ask, ask["tokens"] + 1), 0.0, 0
        while self._core.busy:
            jobs = self._step()
            if first:
                first -= set(jobs)
                began = time.perf_counter()
            else:
                made += len(jobs)
        return {"seconds": time.perf_counter() - began, "tokens": made}

    def streams(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds and tokens of whole answers, prompts included."""
        began, made = time.perf_counter(), 0
        self._submit(ask, ask["tokens"])
        while self._core.busy:
            made += len(self._step())
        return {"seconds": time.perf_counter() - began, "tokens": made}

    def prefill(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        began = time.perf_counter()
        self._submit({"level": ask["level"], "batch": 1, "prompt": ask["tokens"]}, 1)
        while self._core.busy:
            self._step()
        return {"seconds": time.perf_counter() - began, "tokens": ask["tokens"]}

    def _step(self) -> list[int]:
        """One step of the engine; for every token the id of its job. Raises: EngineError."""
        events = self._core.step()
        for _, event in events:
            if isinstance(event, Exception):
                raise event
        return [id(job) for job, _ in events]

    def _submit(self, ask: dict[str, Any], new: int) -> set[int]:
        """Queue greedy requests on random prompts; the ids of their jobs."""
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        size = (ask["batch"], ask["prompt"])
        prompts = torch.randint(self._config["vocab_size"], size, generator=self._prompts)
        jobs = []
        for prompt in prompts.tolist():
            request = GenerationRequest("r", tuple(prompt), sampling)
            jobs.append(Job(ask["level"], request, self._tokenizer))
            self._core.submit(jobs[-1])
        return {id(job) for job in jobs}

    def _weights(self, level: str) -> VariantWeights:
        """Linears of one shape are one packed weight, copied to the device for each: the time of
        a step does not depend on the values."""
        recipe = Recipe.parse(level)
        embed = recipe.step("embed")
        steps = tuple(step for step in recipe.steps if step is not embed)
        tensors: dict[str, Tensor] = {}
        linears: dict[str, StoredLinear] = {}
        made: dict[tuple[int, ...], StoredLinear] = {}
        for name, shape in self._shapes.items():
            table = embed is not None and name in _TABLES
            if not table and not (steps and name.endswith("_proj.weight")):
                tensors[name] = self._random(shape)
                continue
            if shape not in made:
                weight = self._random(shape).float().cpu()
                if embed is not None and table:
                    form: LinearForm = solve(weight, bits=embed.bits)
                else:
                    form = compress_linear(weight, steps, {}, rank=0, dtype=_DTYPE)
                made[shape] = pack(form)
            linears[name.removesuffix(".weight")] = made[shape]
        return VariantWeights(self._config, tensors, linears, _DTYPE)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        empty = torch.empty(shape, dtype=_DTYPE, device="cuda")
        return empty.fill_(1.0) if len(shape) == 1 else empty.normal_(0, _STD, generator=self._seed)


def _tokenizer(size: int) -> Tokenizer:
    """One token per byte, and names for the rest of the vocabulary."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"<x{index}>" for index in range(len(pieces), size)]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=frozenset())


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def main() -> None:
    """Answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    pace: Pace | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if pace is None:
                pace = Pace(ask)
                answer: dict[str, Any] = {"versions": _versions()}
            elif ask["kind"] in {"load", "decode", "streams", "prefill"}:
                answer = getattr(pace, ask["kind"])(ask)
            else:
                answer = {"error": f"kind {ask['kind']!r}: not load, decode, streams or prefill"}
        except Exception as error:  # whoever asked must hear of it, whatever it was
            log.exception("%s failed", ask.get("kind", "the setup"))
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
