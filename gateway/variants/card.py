"""The card: measured facts of one variant on one host. Torch-free; JSON in and out.

Field names are those of `pressgate bench` and `GET /v1/levels`, with units in the names.
`measured=False` marks an estimate made from the method's published behaviour and the dense card;
deciders may use it but must say so.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

_MAX_KL = 100.0  # nats; more is ruin all the same


class Speculation(BaseModel):
    """How fast a level decodes when `drafter` proposes tokens that it verifies, where that pays,
    and how fast without; on held-out text, greedily. Rates as `Card.decode_tokens_per_s`.

    `acceptance` is the share of proposed tokens that were kept.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    drafter: str
    acceptance: float
    decode_tokens_per_s: Mapping[str, float]
    plain_tokens_per_s: Mapping[str, float]


class Card(BaseModel):
    """Size, speed and quality of a variant. Zero or None where a fact is unknown.

    `perplexity_ratio_low` and `_high` are its 95 % confidence interval, `flips` the share of tokens
    where one of dense and this level, not both, names the true next token. Quality is over
    `quality_windows` windows of held-out text, the same for every level.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    measured: bool = False
    host: str = ""
    stored_bytes: int = 0
    resident_bytes: int = 0
    compression_ratio: float = 1.0
    perplexity: float | None = None
    perplexity_ratio: float = 1.0
    perplexity_ratio_low: float | None = None
    perplexity_ratio_high: float | None = None
    kl_nats: float = 0.0
    top1_agreement: float = 1.0
    flips: float = 0.0
    quality_windows: int = 0
    flops_per_token: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: Mapping[str, float] = Field(default_factory=dict)
    speculation: Speculation | None = None
    speedup: float = 1.0
    prefill_speedup: float = 1.0
    build_seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def loss(self) -> float:
        """How much worse than dense, 1.0 is not at all: the larger of the perplexity ratio and
        exp(KL), which is the ratio to expect on text that the dense model would write itself.

        A ratio on one text may fall below 1 by chance although predictions changed; KL cannot.
        """
        if math.isnan(self.perplexity_ratio) or math.isnan(self.kl_nats):
            return math.inf
        return max(1.0, self.perplexity_ratio, math.exp(min(self.kl_nats, _MAX_KL)))

    @property
    def ratio_margin(self) -> float | None:
        """Half the width of the perplexity ratio's confidence interval; None when unknown."""
        if self.perplexity_ratio_low is None or self.perplexity_ratio_high is None:
            return None
        return (self.perplexity_ratio_high - self.perplexity_ratio_low) / 2

    def tpot_ms(self, batch: int) -> float:
        """Time per output token (ms) when `batch` sequences decode together.

        `decode_tokens_per_s[b]` is the whole batch's rate, so one step takes `b / rate` seconds;
        between measured batch sizes the step time is interpolated, beyond them it grows with the
        last slope. 0.0 when nothing was measured.
        """
        points = sorted(
            (int(b), 1000.0 * int(b) / rate) for b, rate in self.decode_tokens_per_s.items() if rate
        )
        if not points:
            return 0.0
        if len(points) == 1 or batch <= points[0][0]:
            return points[0][1]
        index = min(max(bisect_left([b for b, _ in points], batch), 1), len(points) - 1)
        (b0, t0), (b1, t1) = points[index - 1], points[index]
        slope = max(0.0, (t1 - t0) / (b1 - b0))
        return t0 + slope * (batch - b0)

    def prefill_ms(self, tokens: int) -> float:
        """Time (ms) to prefill `tokens` prompt tokens alone on an idle host; 0.0 when unknown."""
        if not self.prefill_tokens_per_s:
            return 0.0
        return 1000.0 * tokens / self.prefill_tokens_per_s
