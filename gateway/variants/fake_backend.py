"""Levels of the stand-in model: no weights, settable speed. For tests and for measuring ourselves.

Every non-dense level must be "built" once (a short sleep), so that on-the-fly paths can be driven
without torch. Speeds scale with the level's expected size, so levels differ.
"""

from __future__ import annotations

import asyncio
import time

from compressors.estimate import estimate
from compressors.recipe import Recipe
from gateway.config import FakeModel, Model
from gateway.engine.base import TextCodec
from gateway.engine.fake import FakeEngine, FakeSpeed, FakeTokenizer
from gateway.variants.backend import LevelSpec, Loaded, ProgressFn
from gateway.variants.card import Card
from gateway.variants.jobs import BuildFailed

_DENSE_BYTES = 32_000_000
_STEPS = 10
_KV_BYTES = 1024


class FakeBackend:
    """`Backend` over `FakeEngine`."""

    context_length = 4096
    max_running = 64
    default_level = "bf16"

    def __init__(self, model: Model, levels: tuple[str, ...]) -> None:
        self.model = model.id
        self._options = model.fake or FakeModel()
        self._recipes = {name: Recipe.parse(name) for name in (self.default_level, *levels)}
        self._artifacts = {name: recipe.parent.name for name, recipe in self._recipes.items()}
        # By artifact, as levels of one artifact are built together.
        self._built = {name for name, recipe in self._recipes.items() if not recipe.steps}
        self._tokenizer = FakeTokenizer()
        self._cards: dict[tuple[str, bool], Card] = {}  # asked for on every request

    @property
    def tokenizer(self) -> TextCodec:
        return self._tokenizer

    async def start(self) -> None:
        """Nothing to read."""

    def ladder(self) -> tuple[LevelSpec, ...]:
        return tuple(LevelSpec(name, recipe.family) for name, recipe in self._recipes.items())

    async def stored(self, level: str) -> bool:
        return self.artifact(level) in self._built

    def card(self, level: str) -> Card:
        built = self.artifact(level) in self._built
        card = self._cards.get((level, built))
        if card is None:
            card = self._cards[level, built] = self._card(level, built)
        return card

    def _card(self, level: str, built: bool) -> Card:
        expected = estimate(self._recipes[level])
        size = int(_DENSE_BYTES * expected.size_ratio)
        step_ms = self._options.tpot_ms * expected.size_ratio or 1e-3
        return Card(
            measured=built,
            stored_bytes=size,
            resident_bytes=size,
            compression_ratio=1 / expected.size_ratio,
            perplexity_ratio=expected.perplexity_ratio,
            kl_nats=expected.kl_nats,
            top1_agreement=expected.top1_agreement,
            prefill_tokens_per_s=self._options.prefill_tokens_per_s,
            decode_tokens_per_s={str(batch): 1000 * batch / step_ms for batch in (1, 8)},
            speedup=1 / expected.size_ratio,
            build_seconds=self._options.build_seconds,
            load_seconds=self._options.load_seconds,
        )

    def kv_bytes_per_token(self, level: str) -> int:
        return _KV_BYTES

    def artifact(self, level: str) -> str:
        return self._artifacts[level]

    def memory(self, level: str) -> str:
        return self.artifact(level)

    def load_bytes(self, level: str) -> int:
        return self.card(level).resident_bytes

    async def load(self, level: str) -> Loaded | None:
        if self.artifact(level) not in self._built:
            return None
        began = time.monotonic()
        await asyncio.sleep(self._options.load_seconds)
        size_ratio = estimate(self._recipes[level]).size_ratio
        engine = FakeEngine(
            FakeSpeed(
                prefill_tokens_per_s=self._options.prefill_tokens_per_s,
                tpot_ms=self._options.tpot_ms * size_ratio,
            )
        )
        return Loaded(engine, self.load_bytes(level), time.monotonic() - began)

    async def build(self, level: str, on_progress: ProgressFn) -> None:
        if level in self._options.failing_levels:
            raise BuildFailed(f"{level} is set to fail")
        for step in range(_STEPS):
            on_progress(step / _STEPS, f"step {step + 1} of {_STEPS}")
            await asyncio.sleep(self._options.build_seconds / _STEPS)
        self._built.add(self.artifact(level))

    async def delete(self, level: str) -> None:
        if self._recipes[level].steps:
            self._built.discard(self.artifact(level))

    async def close(self) -> None:
        """Nothing is held."""
