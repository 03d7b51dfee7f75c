"""The `shapes` command: Llama checkpoints of random weights, to measure speed and nothing else.

Written without torch: bf16 bits of seeded normal numbers, a config, and a byte-level BPE tokenizer
whose merges are spelt out, so that every engine can read, convert and serve the folder. A greedy
answer never ends by itself: the head's row of the end token is zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from loadtest.mix import BadInput

SEED = 0
_STD = 0.02
_CHUNK = 1 << 22  # numbers drawn at once
_SPECIAL = ("<unk>", "<s>", "</s>")
UNK, BOS, EOS = range(len(_SPECIAL))
_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama architecture: sizes of the residual stream, the MLP, the heads and the vocabulary."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    context: int = 2048

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in transformers' names."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        narrow = self.kv_heads * self.head_size
        for index in range(self.layers):
            block = f"model.layers.{index}."
            yield block + "input_layernorm.weight", (self.hidden,)
            yield block + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield block + "self_attn.k_proj.weight", (narrow, self.hidden)
            yield block + "self_attn.v_proj.weight", (narrow, self.hidden)
            yield block + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield block + "post_attention_layernorm.weight", (self.hidden,)
            yield block + "mlp.gate_proj.weight", (self.inner, self.hidden)
            yield block + "mlp.up_proj.weight", (self.inner, self.hidden)
            yield block + "mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": _STD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }


SHAPES = {
    "110m": Shape(hidden=768, layers=12, inner=2048, heads=12, kv_heads=12),
    "450m": Shape(hidden=1536, layers=16, inner=4096, heads=12, kv_heads=4),
    "tiny": Shape(hidden=64, layers=2, inner=192, heads=4, kv_heads=2, vocab=1024, context=256),
}


def command(
    out: Annotated[Path, typer.Argument(help="Folder; each shape gets a folder of its name.")],
    names: Annotated[str, typer.Option("--shapes", help="Comma-separated.")] = "110m,450m",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = SEED,
) -> None:
    """Write Llama checkpoints of random weights: 110m (hidden 768) and 450m (hidden 1536)."""
    chosen = [check_name(name.strip(), "--shapes") for name in names.split(",")]
    if out.exists() and not out.is_dir():
        raise BadInput(f"OUT {out}: is a file")
    for name in chosen:
        try:
            folder = write(out / name, SHAPES[name], seed)
        except OSError as error:
            raise BadInput(f"OUT {out}: {error.strerror or error}") from None
        Console(stderr=True).print(f"{folder}", markup=False, highlight=False)


def check_name(name: str, flag: str) -> str:
    """Raises: BadInput when no shape is called so."""
    if name not in SHAPES:
        raise BadInput(f"{flag} {name}: not one of {', '.join(SHAPES)}")
    return name


def write(folder: Path, shape: Shape, seed: int = SEED) -> Path:
    """Write the checkpoint, unless it is there already; returns its folder.

    The config is written last: a folder with one is whole.
    """
    config = json.dumps(shape.config() | {"random_seed": seed}, indent=2) + "\n"
    done = folder / "config.json"
    if done.is_file() and done.read_text(encoding="utf-8") == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    _write_weights(folder / "model.safetensors", shape, seed)
    _write_tokenizer(folder, shape)
    ends = {"bos_token_id": BOS, "eos_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(ends) + "\n", encoding="utf-8")
    done.write_text(config, encoding="utf-8")
    return folder


def _write_weights(file: Path, shape: Shape, seed: int) -> None:
    """The safetensors file, tensor by tensor (its format: a length, a JSON header, the bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dims in shape.tensors():
        stop = start + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, dims in shape.tensors():
            if len(dims) == 1:
                out.write(_bf16(np.ones(dims, np.float32)).tobytes())
            else:
                _write_matrix(out, rng, dims, name == "lm_head.weight")


def _write_matrix(out: Any, rng: np.random.Generator, dims: tuple[int, ...], head: bool) -> None:
    rows, width = dims
    step = max(EOS + 1, _CHUNK // width)
    for start in range(0, rows, step):
        part = rng.standard_normal((min(step, rows - start), width), np.float32) * np.float32(_STD)
        if head and start == 0:
            part[EOS] = 0.0
        out.write(_bf16(part).tobytes())


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bf16 numbers' bits, ties to even; finite values only."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = vocabulary(shape.vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _SPECIAL[UNK],
        "bos_token": _SPECIAL[BOS],
        "eos_token": _SPECIAL[EOS],
        "model_max_length": shape.context,
        "chat_template": _TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary of `size` tokens and its merges, in order.

    Special tokens, all bytes, then as many pieces of two to four lower-case letters as fit.
    """
    from tokenizers import pre_tokenizers

    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for left, right in _pairs():
        if len(pieces) == size:
            break
        pieces.append(left + right)
        merges.append((left, right))
    return {piece: index for index, piece in enumerate(pieces)}, merges


def _pairs() -> Iterator[tuple[str, str]]:
    letters = ascii_lowercase
    twos = ["".join(pair) for pair in product(letters, letters)]
    yield from product(letters, letters)
    yield from product(twos, letters)
    yield from product(twos, twos)
