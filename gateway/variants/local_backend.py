"""Levels of a local checkpoint: built by worker processes, cached as artifacts, run by torch.

Wires the cache, the card book and the engine together for one model. The pool above owns state.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from cache.disk import Event
from cache.errors import CacheError
from cache.keys import variant_key
from cache.lock import Claim
from compressors.forecast import Forecast
from compressors.recipe import Recipe
from gateway.config import Model, Upstream
from gateway.engine.base import TextCodec
from gateway.engine.tokenizer import Tokenizer, load_tokenizer
from gateway.errors import InvalidRequest, ModelError
from gateway.variants.backend import LevelSpec, Loaded, ProgressFn
from gateway.variants.card import Card
from gateway.variants.expected import Anatomy, Expectations
from gateway.variants.facts import CheckpointFacts, facts_of
from gateway.variants.jobs import BuildFailed, run_worker
from gateway.variants.shared import FACTS, Shared
from gateway.variants.spec import BuildSpec

if TYPE_CHECKING:
    from cache.artifact import Artifact
    from compressors.checkpoint import Checkpoint
    from compressors.export.packed import PackedCheckpoint
    from gateway.engine.model import VariantWeights
    from gateway.engine.upstream import UpstreamEngine

DEFAULT_TEXT = "default-v1"  # stands for the default calibration text in artifact keys
_CHILD = "@"  # in the key of its card, after the artifact's


class LocalBackend:
    """`Backend` of one checkpoint."""

    def __init__(self, model: Model, shared: Shared, folder: Path, levels: tuple[str, ...]) -> None:
        """
        Args:
            folder: the resolved checkpoint folder.
            levels: the ladder's level names; the checkpoint's own dense level is always added.
        """
        self.model = model.id
        self.default_level = ""
        self.context_length = 0
        self._calibration = ""
        self.max_running = shared.settings.engine.max_num_seqs
        self._options = model
        self._shared = shared
        self._folder = folder
        self._names = levels
        self._recipes: dict[str, Recipe] = {}
        self._upstream: Mapping[str, Upstream] = model.upstream
        self._native = ""
        self._imported: PackedCheckpoint | None = None
        self._checkpoint: Checkpoint | None = None
        self._tokenizer: Tokenizer | None = None
        self._source = ""
        self._facts: CheckpointFacts | None = None
        self._anatomy: Anatomy | None = None
        self._expected: Expectations | None = None
        self._keys: dict[str, str] = {}
        self._known_cards: dict[str, Card] = {}  # asked for on every request

    @property
    def tokenizer(self) -> TextCodec:
        return self._native_tokenizer()

    async def start(self) -> None:
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        from compressors.base import CompressionError
        from compressors.checkpoint import Checkpoint
        from compressors.export.formats import open_packed

        try:
            self._checkpoint = Checkpoint(self._folder)
            self._imported = open_packed(self._folder)
            kept = self._shared.settings.cache.root / FACTS
            facts = self._facts = facts_of(kept, self._checkpoint, self._imported)
            self._tokenizer = load_tokenizer(self._folder)
            self._source = self._checkpoint.source_digest
        except CompressionError as error:
            raise ModelError(str(error), param="model") from error
        self._native = self.default_level = facts.native
        if self._imported is not None:
            # it comes compressed and is one level; there is no dense model to make others of
            self.default_level, self._names = self._imported.level, ()
        self._anatomy = facts.anatomy
        self.context_length = self._anatomy.context_length
        self._calibration = self._calibration_digest()
        names = (self.default_level, *self._names)
        self._recipes = {name: Recipe.parse(name) for name in names}
        self._keys = {name: self._key(recipe) for name, recipe in self._recipes.items()}
        self._expected = Expectations(
            facts.shapes,
            self._native,
            self._checkpoint.total_bytes,
            facts.share,
            self._recipes,
            self._measured,
            self._shared.settings.build.threads,
            self._shared.runtime.device,
        )
        self._shared.cards.listen(lambda key: self._known_cards.clear())

    # -- facts ------------------------------------------------------------------------------

    def ladder(self) -> tuple[LevelSpec, ...]:
        own = tuple(LevelSpec(name, recipe.family) for name, recipe in self._recipes.items())
        return own + tuple(LevelSpec(name, "upstream") for name in self._upstream)

    def key(self, level: str) -> str:
        """The artifact key of a level."""
        return self._keys[level]

    def levels_of(self, key: str) -> list[str]:
        """The levels stored under an artifact key, or under that of a card."""
        stored = key.partition(_CHILD)[0]
        return [level for level, known in self._keys.items() if known == stored]

    def artifact(self, level: str) -> str:
        return self._keys.get(level, level)

    def memory(self, level: str) -> str:
        """Mapped bytes are shared; what is copied to a GPU or to another type is not."""
        if level in self._upstream or list(self._keys.values()).count(self.key(level)) == 1:
            return level
        copied = self._compute_dtype(level) != self._native or self._shared.runtime.device != "cpu"
        return level if copied else self.key(level)

    def _card_key(self, level: str) -> str:
        """Levels of one artifact have a card each."""
        child = self._recipes[level].child
        return f"{self.key(level)}{_CHILD}{child}" if child else self.key(level)

    def _key(self, recipe: Recipe) -> str:
        return variant_key(
            model=self.model,
            revision=self._options.revision or "",
            recipe=recipe.parent.name,
            source=self._source,
            calibration=self._calibration if recipe.needs_calibration else "",
            seed=self._shared.settings.build.seed,
        )

    async def stored(self, level: str) -> bool:
        if level == self.default_level or level in self._upstream:
            return True
        return await self._shared.store.manifest(self.key(level)) is not None

    def card(self, level: str) -> Card:
        card = self._known_cards.get(level)
        if card is None:
            card = self._known_cards[level] = self._card(level)
        return card

    def _card(self, level: str) -> Card:
        if level in self._upstream:
            return Card(perplexity_ratio=self._upstream[level].perplexity_ratio)
        assert self._expected is not None
        card = self._measured(level)
        if card is None or not card.decode_tokens_per_s:
            card = self._expected.card(level, card, self._measured(self.default_level))
        return card

    def _measured(self, level: str) -> Card | None:
        return self._shared.cards.get(self._card_key(level))

    def kv_bytes_per_token(self, level: str) -> int:
        if level in self._upstream:
            return 0
        assert self._anatomy is not None
        return self._anatomy.kv_bytes_per_token(self._recipes[level], self._compute_dtype(level))

    def load_bytes(self, level: str) -> int:
        if level in self._upstream:
            return 0
        return self.card(level).resident_bytes

    # -- acts -------------------------------------------------------------------------------

    async def load(self, level: str) -> Loaded | None:
        began = time.monotonic()
        if level in self._upstream:
            engine = _upstream_engine(self._upstream[level])
            return Loaded(engine, 0, time.monotonic() - began)
        held, weights = None, None
        if level == self.default_level:
            weights = await asyncio.to_thread(self._own_weights, level)
        else:
            held = await self._shared.store.fetch(self.key(level))
            if held is None:
                return None
            weights = await asyncio.to_thread(self._artifact_weights, level, held)
        runtime = await asyncio.to_thread(self._shared.runtime.get)
        local = await runtime.load(f"{self.model}@{level}", weights, self._native_tokenizer())
        return Loaded(local, local.resident_bytes, time.monotonic() - began, held)

    async def build(self, level: str, on_progress: ProgressFn) -> None:
        if level in self._upstream:
            raise BuildFailed(f"{level} lives in another server; there is nothing to build")
        key, alike = self.key(level), self.levels_of(self.key(level))

        async def made() -> bool | None:
            """True when the artifact exists and this host has measured it."""
            if not self._shared.cards.measured_here(self._card_key(level)):
                return None
            return True if await self.stored(level) else None

        async def work(claim: Claim) -> bool:
            if level != self.default_level:
                # What another host made is copied and only measured here.
                await self._shared.store.fetch(key)
            cards = {}
            for done, name in enumerate([level, *(other for other in alike if other != level)]):
                cards[name] = await self.measure(name, _part(on_progress, done, len(alike)))
            await claim.check()  # if another gateway took over, its result is the one to use
            if level != self.default_level:
                await self._shared.store.share(key)
                await self._shared.store.shared()  # the card tells replicas that it is there
            for name, card in cards.items():
                await self._shared.cards.put(self._card_key(name), card)
            return True

        try:
            await self._shared.flight.run(key, work, made)
        except CacheError as error:
            raise BuildFailed(str(error)) from error

    async def measure(self, level: str, on_progress: ProgressFn, *, speed: bool = True) -> Card:
        """Run a worker that makes the artifact if it is not there and measures it now.

        Raises:
            BuildFailed.
        """
        if level in self._upstream:
            raise BuildFailed(f"{level} lives in another server; there is nothing to build")
        update = {"measure_speed": speed, "drafters": await self._drafters(level)}
        spec = self._spec(level).model_copy(update=update)
        result = await run_worker(
            spec.model_dump_json().encode(),
            timeout=self._shared.settings.build.timeout_seconds,
            on_progress=on_progress,
            on_event=lambda event, what: self._shared.on_event(Event(event), what),
        )
        return Card.model_validate(result["card"])

    async def _drafters(self, level: str) -> tuple[tuple[str, str], ...] | None:
        """Who may draft for the level now: the text, and the lightest stored level or the one that
        is configured; with its artifact's key."""
        mode = self._shared.settings.engine.speculate
        if mode == "off":
            return None
        found = [("lookup", "")] if mode in ("auto", "lookup") else []
        if mode != "lookup":
            lighter = [
                name
                for name in self._recipes
                if mode in ("auto", name)
                and name not in (level, self.default_level)
                and self._recipes[name].step("kv") is None
                and self._compute_dtype(name) == self._compute_dtype(level)
                and await self.stored(name)
                and self.card(name).resident_bytes < self.card(level).resident_bytes
            ]
            best = min(lighter, key=lambda name: self.card(name).resident_bytes, default=None)
            found += [] if best is None else [(best, self.key(best))]
        return tuple(found) or None

    async def remember(self, level: str, card: Card) -> None:
        """Keep a measured card, here and for replicas on hosts like this one."""
        await self._shared.cards.put(self._card_key(level), card)

    async def export(self, level: str, folder: Path, form: str = "gptq") -> str:
        """Write a stored level as a checkpoint in the format called `form`; returns the folder.

        Raises:
            InvalidRequest: not built, or a level that the format cannot hold.
        """
        from gateway.variants.artifact import export_artifact

        artifact = await self._shared.store.fetch(self.key(level))
        if artifact is None:
            raise InvalidRequest(f"{level} has no artifact to export", param="export")
        child = self._recipes[level].child
        return str(
            await asyncio.to_thread(
                export_artifact, artifact, folder, form, tokenizer_from=self._folder, child=child
            )
        )

    async def delete(self, level: str) -> None:
        if level != self.default_level and level not in self._upstream:
            await self._shared.store.delete(self.key(level))

    async def close(self) -> None:
        """The runtime and the stores are closed by who made them."""

    # -- inside -----------------------------------------------------------------------------

    def _native_tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    # In threads: the first call imports torch's and transformers' model code.

    def _own_weights(self, level: str) -> VariantWeights:
        from compressors.model import torch_dtype
        from gateway.variants.artifact import dense_weights, imported_weights

        dtype = torch_dtype(self._compute_dtype(level))
        if self._imported is not None:
            return imported_weights(self._folder, dtype)
        assert self._checkpoint is not None
        names = None if self._facts is None else self._facts.names
        return dense_weights(self._checkpoint, dtype, identity=self._source, names=names)

    def _artifact_weights(self, level: str, artifact: Artifact) -> VariantWeights:
        from compressors.model import torch_dtype
        from gateway.variants.artifact import weights_of

        dtype = torch_dtype(self._compute_dtype(level))
        return weights_of(artifact, dtype, child=self._recipes[level].child)

    def _compute_dtype(self, level: str) -> str:
        """A dense level computes in its own type, others as configured or as the checkpoint."""
        recipe = self._recipes.get(level)
        if recipe is not None and recipe.dtype is not None:
            return recipe.dtype
        chosen = self._shared.settings.dtype
        return self._native if chosen == "auto" else chosen

    def _calibration_digest(self) -> str:
        file = self._shared.settings.build.calibration
        if file is None:
            return blake3(DEFAULT_TEXT.encode()).hexdigest()
        return blake3(file.read_bytes()).hexdigest()

    def _spec(self, level: str) -> BuildSpec:
        settings = self._shared.settings
        return BuildSpec(
            model=self.model,
            revision=self._options.revision or "",
            folder=self._folder,
            source_digest=self._source,
            level=level,
            key="" if level == self.default_level else self.key(level),
            calibration=settings.build.calibration,
            calibration_digest=self._calibration,
            eval_text=settings.build.eval_text,
            seed=settings.build.seed,
            cache_dir=settings.cache.root,
            disk_budget=settings.cache.disk_budget,
            compute_dtype=self._compute_dtype(level),
            dense_dtype=self._native,
            imported=self._imported is not None,
            device=self._shared.runtime.device,
            threads=settings.build.threads,
            serve_threads=self._shared.runtime.threads,
            nice=settings.build.nice,
        )

    def forecast(self, level: str) -> Forecast:
        """Memory and time that building the level takes, from shapes."""
        assert self._expected is not None
        return self._expected.forecast(level)

    async def report(self, level: str) -> dict[str, Any]:
        """What the job that made a stored level said of itself; empty when there is none."""
        manifest = await self._shared.store.manifest(self.key(level))
        return {} if manifest is None else manifest.report


def _part(on_progress: ProgressFn, done: int, total: int) -> ProgressFn:
    """Progress of one of `total` measurements, `done` of them before it."""
    return lambda share, what: on_progress((done + share) / total, what)


def _upstream_engine(upstream: Upstream) -> UpstreamEngine:
    from gateway.engine.upstream import UpstreamEngine

    key = os.environ.get(upstream.api_key_env) if upstream.api_key_env else None
    return UpstreamEngine(upstream.url, upstream.model, api_key=key)
