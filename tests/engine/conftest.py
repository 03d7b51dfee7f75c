"""Tiny random checkpoints of every tested architecture, and ways to run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gateway.config import BUILTIN
from gateway.engine.base import EngineError, GenerationRequest, SamplingParams, TokenEvent
from gateway.engine.core import Core, Job, LocalOptions
from gateway.engine.runner import VariantWeights
from gateway.engine.tokenizer import Tokenizer, load_tokenizer

VOCAB = 300

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON},
    "mistral": {"model_type": "mistral", **_COMMON, "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", **_COMMON},
    "qwen3": {"model_type": "qwen3", **_COMMON, "head_dim": 16},
    "gemma": {"model_type": "gemma", **_COMMON, "head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", **_COMMON, "head_dim": 16, "sliding_window": 20},
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
    },
}
FAMILIES = tuple(_FAMILIES)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → folder of a random fp32 checkpoint, written by transformers once per session."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            from transformers import CONFIG_MAPPING, AutoModelForCausalLM

            config = dict(_FAMILIES[family])
            torch.manual_seed(FAMILIES.index(family))  # whatever was made before
            model = AutoModelForCausalLM.from_config(
                CONFIG_MAPPING[config.pop("model_type")](**config, initializer_range=0.3)
                if family not in {"opt"}
                else CONFIG_MAPPING[config.pop("model_type")](**config, init_std=0.3)
            )
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return make


def weights_of(folder: Path, dtype: torch.dtype = torch.float32) -> VariantWeights:
    """A dense variant of a checkpoint folder, its tensors as transformers reads them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return VariantWeights(model.config.to_dict(), tensors, {}, dtype)


def reference_model(folder: Path) -> Any:
    """transformers' own fp32 model, eager attention (the one that knows Gemma 2's softcap)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_tokens(model: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy continuation by transformers.generate, end of sequence ignored."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
    )
    return list(out[0, len(prompt) :].tolist())


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    """Byte-level, one token per byte (ids 0-2 special, 3 + byte): enough for random models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(alphabet)}
    vocab |= {f"<x{i}>": i for i in range(len(vocab), VOCAB)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    return Tokenizer(backend, eos_ids=frozenset({2}))


@pytest.fixture(scope="session")
def builtin_tokenizer() -> Tokenizer:
    return load_tokenizer(BUILTIN)


@pytest.fixture(scope="session")
def builtin_weights() -> VariantWeights:
    return weights_of(BUILTIN)


def request(
    prompt: list[int], max_tokens: int = 8, *, prompt_logprobs: bool = False, **sampling: Any
) -> GenerationRequest:
    """A request; greedy and deaf to the end of sequence unless told otherwise."""
    options: Mapping[str, Any] = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(
        id="r",
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **options),
        prompt_logprobs=prompt_logprobs,
    )


def steps(core: Core) -> Iterator[list[tuple[Job, TokenEvent | EngineError]]]:
    """Step until nothing is left, checking every book after every step."""
    while core.busy:
        events = core.step()
        core.check_integrity()
        yield events


def run(core: Core, jobs: list[Job]) -> list[list[TokenEvent]]:
    """Submit jobs, run them to the end; their events. An engine error is raised."""
    found: dict[int, list[TokenEvent]] = {id(job): [] for job in jobs}
    for job in jobs:
        core.submit(job)
    for events in steps(core):
        for job, event in events:
            if isinstance(event, EngineError):
                raise event
            found[id(job)].append(event)
    return [found[id(job)] for job in jobs]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def small_core(**options: Any) -> Core:
    """A core with small chunks and blocks, so that borders are met."""
    defaults: dict[str, Any] = {
        "max_num_seqs": 8,
        "prefill_chunk": 16,
        "block_size": 4,
        "kv_bytes": 8 << 20,
    }
    return Core(LocalOptions(**(defaults | options)))


def save_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
