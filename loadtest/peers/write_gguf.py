"""A Llama folder as `loadtest shapes` writes it, in llama.cpp's format. Runs in the peers' own
Python, which has the `gguf` package: `python write_gguf.py FOLDER OUT.gguf`. Needs no torch."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3
_BF16_FILE = 32


def convert(folder: Path, out: Path) -> None:
    """Write `out` from the folder's config, tokenizer and bf16 weights."""
    gguf: Any = import_module("gguf")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_BF16_FILE)
    _add_tokenizer(writer, folder, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    kind = gguf.GGMLQuantizationType.BF16
    for name, bits in _weights(folder / "model.safetensors"):
        module = name.removesuffix(".weight")
        target = _target(module)
        if bits.ndim == 1:  # norms are wanted in fp32
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(target, values)
            continue
        turned = _interleaved(bits, heads.get(module.rpartition(".")[2]))
        writer.add_tensor(target, np.ascontiguousarray(turned).view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {added["id"] for added in model["added_tokens"]}
    vocab = sorted(model["model"]["vocab"].items(), key=lambda item: item[1])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]]
    kinds = [_CONTROL_TOKEN if index in special else _NORMAL_TOKEN for _, index in vocab]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _weights(file: Path) -> Any:
    """Name and bits (uint16, mapped) of every bf16 tensor."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
    data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{file}: {name} is {entry['dtype']}, not BF16")
        start, stop = entry["data_offsets"]
        yield name, data[start:stop].view(np.uint16).reshape(entry["shape"])


def _target(module: str) -> str:
    if module in _NAMES:
        return f"{_NAMES[module]}.weight"
    _, _, index, *rest = module.split(".")
    return f"blk.{index}.{_NAMES['.'.join(rest)]}.weight"


def _interleaved(weight: Any, heads: int | None) -> Any:
    """Rows of queries and keys in llama.cpp's order of rotary pairs: neighbours, not halves."""
    if heads is None:
        return weight
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
