"""What a level that was never measured here is expected to be: from shapes and from other cards.

Owns the arithmetic only; who asks for a card prefers a measured one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compressors.estimate import estimate
from compressors.forecast import Forecast, Shapes, forecast
from compressors.kv_scheme import scheme_of
from compressors.recipe import Recipe
from gateway.variants.card import Card

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_BUILD_OVERHEAD_S = 15.0  # of every worker: to start, and to measure the card
_PACE = (0.1, 10.0)  # bounds on what this host takes ÷ what was forecast
_TELLING_S = 2.0  # a build forecast to be shorter is mostly overhead and tells nothing of the pace


@dataclass(frozen=True)
class Anatomy:
    """What a model's config says of its context and of its keys and values.

    Attributes:
        context_length: positions it was made for.
        layers: decoder blocks.
        kv_heads: heads whose keys and values are kept, of one layer.
        head_dim: of a key or value.
    """

    context_length: int
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Anatomy:
        """From a transformers text config; architectures name the same thing differently."""
        heads = config.num_attention_heads
        return cls(
            context_length=_context_length(config),
            layers=int(config.num_hidden_layers),
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        )

    def kv_bytes_per_token(self, recipe: Recipe, dtype: str) -> int:
        """Bytes of KV cache that a token of context takes at a level that computes in `dtype`."""
        depth = recipe.step("depth")
        share = 1.0 if depth is None else depth.percent / 100
        heads = max(1, round(self.layers * share)) * self.kv_heads
        scheme = scheme_of(recipe)
        if scheme is not None:
            return -(-scheme.block_bytes(heads, self.head_dim, self.head_dim) // scheme.group)
        return 2 * heads * self.head_dim * ITEM_BYTES[dtype]


@dataclass
class Expectations:
    """Expected cards of one model's levels.

    Attributes:
        shapes: of its parts; None when it came compressed, and nothing can be built of it.
        dtype: its own, `fp32`, `bf16` or `fp16`.
        total_bytes: of its weight files.
        linear_share: part of them that the decoder blocks hold.
        recipes: its levels.
        measured: the card that this host measured of a level, if it did.
    """

    shapes: Shapes | None
    dtype: str
    total_bytes: int
    linear_share: float
    recipes: Mapping[str, Recipe]
    measured: Callable[[str], Card | None]
    threads: int
    device: str
    _forecasts: dict[str, Forecast] = field(default_factory=dict)

    def forecast(self, level: str) -> Forecast:
        """Memory and time that building the level takes, from shapes."""
        if self.shapes is None:
            return Forecast(0, 0.0)
        if level not in self._forecasts:
            recipe = self.recipes[level]
            self._forecasts[level] = forecast(
                self.shapes, recipe, threads=self.threads, device=self.device
            )
        return self._forecasts[level]

    def card(self, level: str, elsewhere: Card | None, dense: Card | None) -> Card:
        """An estimate from the method's known behaviour, never marked as measured.

        Args:
            elsewhere: what another host measured of the level; its quality and size hold here.
            dense: this host's card of the dense level, whose speed the level is expected to have.
        """
        recipe = self.recipes[level]
        expected = estimate(recipe, linear_share=self.linear_share)
        packed = self.shapes is None  # the best there is of this model: its own reference
        # The estimate is against 16-bit weights.
        ratio = 1.0 if packed else expected.size_ratio * 2 / ITEM_BYTES[self.dtype]
        size = int(self.total_bytes * ratio)
        facts: dict[str, Any] = {
            "stored_bytes": size,
            "resident_bytes": size,
            "compression_ratio": 1.0 / ratio,
            "perplexity_ratio": 1.0 if packed else expected.perplexity_ratio,
            "kl_nats": 0.0 if packed else expected.kl_nats,
            "top1_agreement": 1.0 if packed else expected.top1_agreement,
            "build_seconds": _BUILD_OVERHEAD_S + self.forecast(level).seconds * self._pace(),
        }
        if elsewhere is not None:
            facts |= elsewhere.model_dump(exclude_defaults=True)
        if dense is not None:
            # Fewer layers are surely faster; what a kernel gains is known when it was timed here.
            depth = recipe.step("depth")
            gain = 100 / depth.percent if depth is not None else 1.0
            facts["prefill_tokens_per_s"] = dense.prefill_tokens_per_s * gain
            facts["decode_tokens_per_s"] = {
                batch: rate * gain for batch, rate in dense.decode_tokens_per_s.items()
            }
        return Card(**facts | {"measured": False})

    def _pace(self) -> float:
        """What builds of this model take on this host ÷ what was forecast; the middle of all."""
        known = sorted(
            card.build_seconds / self.forecast(level).seconds
            for level in self.recipes
            if (card := self.measured(level)) is not None
            and card.build_seconds
            and self.forecast(level).seconds >= _TELLING_S
        )
        return min(max(known[len(known) // 2], _PACE[0]), _PACE[1]) if known else 1.0


def _context_length(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048
