"""Where an artifact's bytes are: embeddings, attention, MLP, head, norms, scales and so on.

Torch-free; parts are told by the names that architectures give to their modules.
"""

from __future__ import annotations

from collections.abc import Mapping

from cache.manifest import ModuleRecord, TensorRecord

# The first that fits decides; most particular first.
_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("head", ("lm_head", "embed_out")),
    ("embeddings", ("embed", "wte", "wpe", "wpt")),
    ("norms", ("norm", "ln_", "layernorm")),
    ("experts", (".experts.",)),
    ("attention", ("attn", "attention")),
    ("MLP", ("mlp", "ffn", "feed_forward", ".fc", "dense", "moe")),
)
_WEIGHTS = ("codes", "weight", "high", "low", "values", "left", "right")


def bytes_by_part(
    tensors: Mapping[str, TensorRecord], modules: Mapping[str, ModuleRecord]
) -> dict[str, int]:
    """Part → bytes stored, largest first; what a tensor shares with another counts once."""
    beside = {
        name
        for record in modules.values()
        for suffix, name in record.tensors.items()
        if not suffix.rpartition(".")[2].startswith(_WEIGHTS)
    }
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    for name, record in tensors.items():
        if record.digest in seen:
            continue
        seen.add(record.digest)
        part = "scales, zeros and masks" if name in beside else part_of(name)
        sizes[part] = sizes.get(part, 0) + record.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def part_of(name: str) -> str:
    """The part of a model that parameter `name` belongs to."""
    lower = name.lower()
    return next((part for part, words in _PARTS if any(w in lower for w in words)), "other")
