"""What all local models of a gateway share: cache, cards, and the engine runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from cache.disk import EventFn
from cache.single_flight import SingleFlight
from cache.tiered import ArtifactStore
from gateway.config import Settings
from gateway.variants.cards import CardBook

if TYPE_CHECKING:
    from gateway.engine.local import LocalRuntime

# Folders of the cache.
OUTLINES = "outlines"  # see `engine.outlines`
FACTS = "facts"  # see `variants.facts`


class Runtime:
    """The engine runtime, started by the first load: torch is not imported before that."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._runtime: LocalRuntime | None = None
        self.threads = settings.threads or os.cpu_count() or 1
        has_weights = any(model.fake is None for model in settings.models)
        self.kv_budget = int(settings.memory_budget * settings.engine.kv_fraction) * has_weights

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV pools that exist now."""
        return self._runtime.kv_bytes if self._runtime is not None else 0

    @cached_property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where variants run; asking imports torch when the configuration says `auto`."""
        if self._settings.device != "auto":
            return self._settings.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def get(self) -> LocalRuntime:
        from gateway.engine.local import LocalOptions, LocalRuntime

        if self._runtime is None or not self._runtime.alive:
            engine = self._settings.engine
            self._runtime = LocalRuntime(
                LocalOptions(
                    device=self.device,
                    threads=self.threads,
                    max_num_seqs=engine.max_num_seqs,
                    max_waiting=engine.max_waiting,
                    prefill_chunk=engine.prefill_chunk,
                    block_size=engine.block_size,
                    kv_bytes=self.kv_budget,
                    prefix_cache=engine.prefix_cache,
                    speculate=engine.speculate,
                    outlines=self._settings.cache.root / OUTLINES,
                )
            )
        return self._runtime

    async def close(self) -> None:
        if self._runtime is not None:
            await self._runtime.close()


@dataclass(frozen=True, slots=True)
class Shared:
    """What all local models of a gateway share."""

    settings: Settings
    store: ArtifactStore
    flight: SingleFlight
    cards: CardBook
    runtime: Runtime
    on_event: EventFn  # what workers' disk caches evicted or found damaged
