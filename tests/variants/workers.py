"""Real build workers on random models: making the model, starting, watching and killing them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cache.keys import variant_key
from compressors.checkpoint import Checkpoint
from gateway.config import BUILTIN
from gateway.engine.tokenizer import load_tokenizer
from gateway.variants.spec import BuildSpec


def random_model(folder: Path, *, hidden: int, inter: int, layers: int, shard: str) -> Path:
    """A bf16 Llama of random weights in shards, with the bundled model's tokenizer."""
    config = LlamaConfig(
        vocab_size=load_tokenizer(BUILTIN).vocab_size,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    return folder


def spec_of(folder: Path, cache_dir: Path, level: str, **options: Any) -> BuildSpec:
    key = variant_key(model="random", revision="", recipe=level, source="", calibration="", seed=0)
    facts: dict[str, Any] = {
        "model": "random",
        "revision": "",
        "folder": folder,
        "source_digest": Checkpoint(folder).source_digest,
        "level": level,
        "key": key,
        "calibration": None,
        "calibration_digest": "",
        "eval_text": None,
        "seed": 0,
        "cache_dir": cache_dir,
        "disk_budget": 2**33,
        "compute_dtype": "bf16",
        "dense_dtype": "bf16",
        "device": "cpu",
        "threads": 1,
        "serve_threads": 1,
        "nice": 0,
        "measure_speed": False,
        "note_seconds": 0.0,
    }
    return BuildSpec(**facts | options)


class Worker:
    """A build worker that reports line by line. A context manager: it is gone at the end."""

    def __init__(self, spec: BuildSpec) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.variants.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(spec.model_dump_json().encode())
        self._process.stdin.close()

    def messages(self) -> Iterator[str]:
        """What it says, until it has the artifact."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "error" in said:
                raise AssertionError(said["error"])
            message = said.get("message", "")
            if message == "measuring quality":
                return
            yield message

    def built(self) -> None:
        """Wait until it has the artifact."""
        for _ in self.messages():
            pass

    def kill_after(self, message: str) -> None:
        """SIGKILL it as soon as it says so."""
        assert message in self.messages(), f"it never said {message!r}"
        self._process.kill()
        self._process.wait()

    def reset_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5", encoding="ascii")

    def memory(self, field: str) -> int:
        """`VmRSS` or `VmHWM` (its peak) in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
