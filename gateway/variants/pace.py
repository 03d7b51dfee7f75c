"""A process that times levels on demand, so that other engines can be timed in turn with it.

`python -m gateway.variants.pace`: one `Setup` as a JSON line on standard input, then one `Ask` a
line; a JSON object a line comes back (`{"error": text}` for what cannot be done). It drives the
engine that serves, without HTTP. Levels that are not stored yet are made first, outside any timing.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.variants.spec import BuildSpec
from gateway.variants.worker import take_stdout

_DISK_BUDGET = 2**40
_SEED = 1


class Setup(BaseModel):
    """What to time.

    Attributes:
        folder: a dense checkpoint; `name` is what it is called in artifact keys.
        cache_dir: where levels are stored; the same folder serves a gateway of that model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    name: str
    cache_dir: Path
    threads: int = Field(ge=1)
    max_num_seqs: int = Field(16, ge=1, le=256)
    prefill_chunk: int = Field(512, ge=16)
    kv_bytes: int = Field(512 * 2**20, ge=2**20)


class Ask(BaseModel):
    """One thing to do.

    Attributes:
        kind: `make` the artifact; `load` and `drop` a level; `decode` `tokens` steps of `batch`
            sequences, from when all have their first token; `prefill` a prompt of `tokens`, to its
            first token; `read` the artifact's bytes; `facts` of a loaded level; `forget` the
            artifact's pages of the file cache.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["make", "load", "drop", "decode", "prefill", "read", "facts", "forget"]
    level: str
    batch: int = Field(1, ge=1, le=256)
    prompt: int = Field(8, ge=1)
    tokens: int = Field(64, ge=1)


class Pace:
    """The levels of one checkpoint on one engine core."""

    def __init__(self, setup: Setup) -> None:
        import torch

        from cache.disk import DiskStore
        from compressors.checkpoint import Checkpoint
        from gateway.engine.core import Core, LocalOptions
        from gateway.engine.tokenizer import load_tokenizer

        torch.set_num_threads(setup.threads)
        self._setup = setup
        self._checkpoint = Checkpoint(setup.folder)
        self._disk = DiskStore(setup.cache_dir, _DISK_BUDGET)
        self._tokenizer = load_tokenizer(setup.folder)
        self._core = Core(
            LocalOptions(
                threads=setup.threads,
                max_num_seqs=setup.max_num_seqs,
                prefill_chunk=setup.prefill_chunk,
                kv_bytes=setup.kv_bytes,
                prefix_cache=False,
            )
        )
        self._sizes: dict[str, int] = {}
        self._rng = torch.Generator().manual_seed(_SEED)

    def answer(self, ask: Ask) -> dict[str, Any]:
        """Do it. Raises: CompressionError, CacheError, ValueError, OSError."""
        found: dict[str, Any] = getattr(self, f"_{ask.kind}")(ask)
        return found

    # -- levels -----------------------------------------------------------------------------

    def _make(self, ask: Ask) -> dict[str, Any]:
        from gateway.variants.build import make_artifact

        key = self._key(ask.level)
        if key and self._disk.manifest(key) is None:
            spec = self._spec(ask.level, key)
            make_artifact(spec, self._checkpoint, self._disk, lambda _share, _message: None)
        return {"bytes": self._stored(key)}

    def _load(self, ask: Ask) -> dict[str, Any]:
        """Seconds from the files to an engine that takes requests."""
        from compressors.model import torch_dtype
        from compressors.recipe import Recipe
        from gateway.engine.outlines import open_model
        from gateway.variants.artifact import dense_weights, weights_of
        from gateway.variants.facts import facts_of
        from gateway.variants.shared import FACTS, OUTLINES

        recipe, key = Recipe.parse(ask.level), self._key(ask.level)
        cache, checkpoint = self._setup.cache_dir, self._checkpoint
        identity, names = checkpoint.source_digest, facts_of(cache / FACTS, checkpoint, None).names
        began = time.perf_counter()
        if not key:
            dtype = torch_dtype(recipe.dtype or "bf16")
            weights = dense_weights(checkpoint, dtype, identity=identity, names=names)
        else:
            artifact = self._disk.read(key)
            if artifact is None:
                raise ValueError(f"{ask.level} is not stored")
            weights = weights_of(artifact, torch_dtype("bf16"), child=recipe.child)
        model = open_model(weights, cache / OUTLINES, max_batch=self._setup.max_num_seqs)
        self._core.attach(ask.level, model, self._tokenizer)
        self._sizes[ask.level] = model.resident_bytes
        seconds = time.perf_counter() - began
        gc.freeze()  # as the server does: else a collection walks all libraries in some timing
        return {"seconds": seconds}

    def _drop(self, ask: Ask) -> dict[str, Any]:
        self._core.detach(ask.level)
        del self._sizes[ask.level]
        gc.collect()
        return {}

    def _facts(self, ask: Ask) -> dict[str, Any]:
        """Bytes: stored, of the level's tensors, of the KV pools, and of this process's memory."""
        import psutil

        memory = psutil.Process().memory_full_info()
        return {
            "stored_bytes": self._stored(self._key(ask.level)),
            "resident_bytes": self._sizes[ask.level],
            "kv_bytes": self._core.kv_bytes,
            "process_bytes": memory.rss,
        }

    # -- timings ----------------------------------------------------------------------------

    def _decode(self, ask: Ask) -> dict[str, Any]:
        """Seconds and tokens of the steps after the last prompt was computed."""
        first = self._submit(ask, ask.tokens + 1)
        began, made = 0.0, 0
        while self._core.busy:
            jobs = self._step()
            if first:
                first -= set(jobs)
                began = time.perf_counter()
            else:
                made += len(jobs)
        return {"seconds": time.perf_counter() - began, "tokens": made}

    def _prefill(self, ask: Ask) -> dict[str, Any]:
        began = time.perf_counter()
        self._submit(ask.model_copy(update={"prompt": ask.tokens, "batch": 1}), 1)
        while self._core.busy:
            self._step()
        return {"seconds": time.perf_counter() - began, "tokens": ask.tokens}

    def _step(self) -> list[int]:
        """One step of the engine; for every token the id of its job. Raises: EngineError."""
        events = self._core.step()
        for _, event in events:
            if isinstance(event, Exception):
                raise event
        return [id(job) for job, _ in events]

    def _submit(self, ask: Ask, new: int) -> set[int]:
        """Queue greedy requests on random prompts; the ids of their jobs."""
        import torch

        from gateway.engine.base import GenerationRequest, SamplingParams
        from gateway.engine.job import Job

        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        jobs = []
        for index in range(ask.batch):
            ids = torch.randint(self._tokenizer.vocab_size, (ask.prompt,), generator=self._rng)
            request = GenerationRequest(str(index), tuple(ids.tolist()), sampling)
            jobs.append(Job(ask.level, request, self._tokenizer))
            self._core.submit(jobs[-1])
        return {id(job) for job in jobs}

    def _read(self, ask: Ask) -> dict[str, Any]:
        """Seconds to read all the files of the level's bytes once, in pieces of 4 MiB."""
        began, count, buffer = time.perf_counter(), 0, bytearray(4 << 20)
        for path in self._files(ask.level):
            with path.open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    count += got
        return {"seconds": time.perf_counter() - began, "bytes": count}

    def _forget(self, ask: Ask) -> dict[str, Any]:
        """Let the kernel drop the files' clean pages; those still mapped by someone stay."""
        for path in self._files(ask.level):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {}

    # -- inside -----------------------------------------------------------------------------

    def _key(self, level: str) -> str:
        """The artifact's key; empty for the checkpoint's own dense level."""
        from cache.keys import variant_key
        from compressors.recipe import Recipe
        from gateway.variants.facts import NATIVE_LEVELS

        recipe, own = Recipe.parse(level), str(self._checkpoint.config.get("dtype"))
        if recipe.name == NATIVE_LEVELS.get(own):
            return ""
        if recipe.needs_calibration:
            raise ValueError(f"{level} needs calibration; data-free levels are timed here")
        return variant_key(
            model=self._setup.name,
            revision="",
            recipe=recipe.parent.name,
            source=self._checkpoint.source_digest,
            calibration="",
            seed=0,
        )

    def _spec(self, level: str, key: str) -> BuildSpec:
        setup = self._setup
        return BuildSpec(
            model=setup.name,
            revision="",
            folder=setup.folder,
            source_digest=self._checkpoint.source_digest,
            level=level,
            key=key,
            calibration=None,
            calibration_digest="",
            eval_text=None,
            seed=0,
            cache_dir=setup.cache_dir,
            disk_budget=_DISK_BUDGET,
            compute_dtype="bf16",
            dense_dtype="bf16",
            device="cpu",
            threads=setup.threads,
            serve_threads=setup.threads,
            nice=0,
        )

    def _files(self, level: str) -> list[Path]:
        """The files that hold the level's bytes."""
        key = self._key(level)
        if not key:
            return list(self._checkpoint.files)
        manifest = self._disk.manifest(key)
        if manifest is None:
            raise ValueError(f"{level} is not stored")
        return [self._disk.blobs.path(digest) for digest in manifest.blobs]

    def _stored(self, key: str) -> int:
        manifest = self._disk.manifest(key) if key else None
        return self._checkpoint.total_bytes if manifest is None else manifest.total_bytes


def main() -> int:
    """Answer until standard input ends; 2 for a setup that is none."""
    out = take_stdout()

    def say(message: dict[str, Any]) -> None:
        out.write(orjson.dumps(message) + b"\n")
        out.flush()

    try:
        setup = Setup.model_validate_json(sys.stdin.buffer.readline())
    except ValidationError as error:
        say({"error": str(error)})
        return 2
    os.environ["OMP_NUM_THREADS"] = str(setup.threads)  # before torch reads it
    pace: Pace | None = None
    for line in sys.stdin.buffer:
        try:
            ask = Ask.model_validate_json(line)
            pace = pace or Pace(setup)
            say(pace.answer(ask))
        except Exception as error:  # whoever asked must hear of it, whatever it was
            say({"error": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
