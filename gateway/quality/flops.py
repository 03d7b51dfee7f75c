"""Floating-point operations per token, from shapes: what a level saves on paper.

A multiply and an add count as two, as in Kaplan et al. (arXiv:2001.08361, section 2.1) and the PaLM
paper's model FLOPs utilisation (arXiv:2204.02311, appendix B). Norms, activations, rotary
embedding, softmax and look-ups are left out: they are small beside the linears. Quantization
changes bytes, not operations; low rank, sparsity and dropped layers change operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressors.forms.corrected import Corrected
from compressors.forms.sparse import Bitmap
from compressors.forms.table import Table
from compressors.model import parse_config
from compressors.tensor import LinearForm, LowRank, Sparse24

Shape = tuple[int, int]


@dataclass(frozen=True)
class Flops:
    """Operations to process one token: `linear` in decoder blocks, `attention`, output `head`."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.linear + self.attention + self.head


def linear_flops(weight: LinearForm | Shape) -> int:
    """Operations of one linear on one token: 2·N·K for a plain or quantized [N, K] weight, half of
    that for half sparsity, 2·r·(N + K) for rank r."""
    if isinstance(weight, Table):
        return 0  # a look-up; as a head it is counted there
    if isinstance(weight, Corrected):
        return linear_flops(weight.base) + linear_flops(weight.correction)
    if isinstance(weight, LowRank):
        return linear_flops(weight.left) + linear_flops(weight.right)
    if isinstance(weight, (Sparse24, Bitmap)):
        return linear_flops(weight.values)
    rows, columns = weight.shape if isinstance(weight, LinearForm) else weight
    return 2 * rows * columns


def attention_flops(config: Mapping[str, Any], context: int) -> int:
    """Operations of all layers' attention for one new token that sees `context` tokens.

    Scores and weighted sum are 2·heads·head_dim·context each; key-value heads that are shared by
    several query heads save bytes, not operations. Layers with a sliding window see at most that.
    """
    parsed = parse_config(config)
    heads = int(parsed.num_attention_heads)
    size = getattr(parsed, "head_dim", None) or parsed.hidden_size // heads
    return sum(4 * heads * int(size) * seen for seen in _seen(parsed, context))


def flops_per_token(
    config: Mapping[str, Any], linears: Mapping[str, LinearForm | Shape], *, context: int
) -> Flops:
    """Operations per token of a model with these decoder linears at this context length.

    Args:
        config: of the compressed model (its number of layers, not the dense one's).
        linears: every linear inside the decoder blocks: its form, or (N, K) where it is plain.
        context: tokens that the new token attends to, itself included.
    """
    parsed = parse_config(config)
    return Flops(
        linear=sum(linear_flops(weight) for weight in linears.values()),
        attention=attention_flops(config, context),
        head=2 * int(parsed.vocab_size) * int(parsed.hidden_size),
    )


def utilisation(flops: Flops, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation: the share of the machine's peak that went into the model.

    Raises:
        ValueError: the peak is not positive.
    """
    if peak_flops_per_s <= 0:
        raise ValueError("peak FLOPs per second must be positive")
    return flops.total * tokens_per_s / peak_flops_per_s


def _seen(parsed: Any, context: int) -> list[int]:
    """Tokens that each layer's attention reads."""
    layers = int(parsed.num_hidden_layers)
    window = getattr(parsed, "sliding_window", None)
    kinds = getattr(parsed, "layer_types", None)
    if not window:
        return [context] * layers
    if not kinds:
        kinds = ["sliding_attention"] * layers
    return [min(context, int(window)) if kind == "sliding_attention" else context for kind in kinds]
