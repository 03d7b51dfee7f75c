"""The command line as users run it, and small real checkpoints to point it at."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from gateway.cli import main
from tests.support.gateway_process import GatewayProcess

COMMAND_S = 280.0
# The bundled model for tests that wait for builds on a machine that may be busy.
PATIENT: dict[str, Any] = {
    "models": [{"id": "docs-17m", "path": "builtin"}],
    "levels": ["bf16", "int8", "int4-rtn-g64"],
    "memory_budget": "1GiB",
    "threads": 1,
    "policies": [{"name": "default", "wait_ms": 270_000}],
}


def pressgate(
    *arguments: str, env: Mapping[str, str] | None = None, timeout: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; the caller judges the exit status."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **(env or {})},
    )


def facts(*arguments: str) -> Any:
    """The JSON that a command printed; it must have ended well."""
    done = pressgate(*arguments)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)


def complaint(*arguments: str) -> str:
    """The one line a command ends with on bad input: exit status 2, nothing else, no traceback.

    Runs in this process: what is refused ends before anything is kept.
    """
    out, err = io.StringIO(), io.StringIO()
    level = logging.getLogger().level
    argv = ["pressgate", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", argv):
            main()
    except SystemExit as end:
        status = end.code
    else:
        status = 0
    finally:
        logging.getLogger().setLevel(level)
    assert status == 2, f"{arguments}: {status}\n{out.getvalue()}{err.getvalue()}"
    assert out.getvalue() == ""
    return one_line(err.getvalue())


def one_line(errors: str) -> str:
    assert "Traceback" not in errors
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    return lines[0]


def wait_for_jobs(gateway: GatewayProcess, seconds: float = COMMAND_S) -> list[dict[str, Any]]:
    """Wait until no job is queued or running; returns all of them."""
    until = time.monotonic() + seconds
    while True:
        jobs: list[dict[str, Any]] = gateway.get("/v1/jobs")["data"]
        if all(job["finished"] for job in jobs):
            return jobs
        assert time.monotonic() < until, jobs
        time.sleep(0.2)


def tiny_checkpoint(folder: Path, kind: Literal["llama", "gpt2"] = "llama") -> Path:
    """A random model of a few hundred kilobytes with a byte-level tokenizer, as transformers
    writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = (
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
        )
        if kind == "llama"
        else GPT2Config(
            vocab_size=256,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
