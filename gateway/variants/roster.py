"""Every level of every model in the pool: finding one, what is resident, what deciders may know.

Reads the variants' records; moves none from one `State` to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.errors import NotFound
from gateway.variants.backend import Backend
from gateway.variants.entry import Variant, weight_bytes
from gateway.variants.ladder import Ladder
from gateway.variants.variant import LadderSnapshot


class Roster:
    """The variants of every backend that was opened, by model and level.

    Of `memory_budget` bytes, `kv_budget` are kept free for KV pools, whose present size `kv_bytes`
    tells.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        memory_budget: int,
        kv_budget: int,
        kv_bytes: Callable[[], int],
    ) -> None:
        self._backends = {backend.model: backend for backend in backends}
        self._variants: dict[str, dict[str, Variant]] = {}
        self._ladders: dict[str, Ladder] = {}
        self._kv_bytes = kv_bytes
        self._weighed: tuple[list[int], int] = ([], 0)
        self.memory_budget = memory_budget
        self.weight_budget = memory_budget - kv_budget

    def add(self, backend: Backend, variants: Sequence[Variant]) -> None:
        """Enter the levels of a backend that was opened."""
        self._variants[backend.model] = {variant.spec.level: variant for variant in variants}
        self._ladders[backend.model] = Ladder(variants)

    # -- finding ----------------------------------------------------------------------------

    @property
    def backends(self) -> list[Backend]:
        return list(self._backends.values())

    def models(self) -> list[str]:
        return list(self._backends)

    def backend(self, model: str) -> Backend:
        """Raises: NotFound."""
        if model not in self._backends:
            known = ", ".join(self._backends)
            raise NotFound(
                f"no model {model!r}; there is {known}", param="model", code="model_not_found"
            )
        return self._backends[model]

    def variant(self, model: str, level: str) -> Variant:
        """Raises: NotFound: unknown model or level."""
        self.backend(model)
        variants = self._variants.get(model, {})
        if level not in variants:
            known = ", ".join(variants)
            raise NotFound(
                f"no level {level!r} of {model}; there is {known}",
                param="model",
                code="level_not_found",
            )
        return variants[level]

    def find(self, model: str, level: str) -> Variant | None:
        """None where there is no such model or level."""
        return self._variants.get(model, {}).get(level)

    def of(self, model: str) -> list[Variant]:
        """Every level of `model`."""
        return list(self._variants.get(model, {}).values())

    def all(self) -> list[Variant]:
        return [v for variants in self._variants.values() for v in variants.values()]

    def alike(self, variant: Variant) -> list[Variant]:
        """The other levels that come from the same artifact."""
        backend = variant.backend
        shared = backend.artifact(variant.spec.level)
        return [
            other
            for other in self.of(backend.model)
            if other is not variant and backend.artifact(other.spec.level) == shared
        ]

    # -- facts ------------------------------------------------------------------------------

    def weight_bytes(self) -> int:
        """Bytes of weights resident or being loaded; weighed anew only when a level's changed."""
        resident = [v.resident_bytes for vs in self._variants.values() for v in vs.values()]
        if resident != self._weighed[0]:
            self._weighed = (resident, weight_bytes(self.all()))
        return self._weighed[1]

    def memory_used(self) -> int:
        """Bytes of weights resident or being loaded, plus KV pools that exist."""
        return self.weight_bytes() + self._kv_bytes()

    def snapshot(self, model: str, now: float, *, closely: bool) -> LadderSnapshot:
        """The ladder of `model` at `now` (the pool's clock); `closely` as in `Ladder.look`.

        Raises:
            NotFound: unknown model.
        """
        backend = self.backend(model)
        building = running = tokens = 0
        for name, ladder in self._ladders.items():
            ladder.look(now, closely=closely and name == model)
            building += ladder.building
            running += ladder.running
            tokens += ladder.waiting_prompt_tokens
        weights = self.weight_bytes()
        return LadderSnapshot(
            model=backend.model,
            levels=self._ladders[model].facts if model in self._ladders else (),
            memory_budget=self.memory_budget,
            memory_used=weights + self._kv_bytes(),
            weight_budget=self.weight_budget,
            weight_used=weights,
            building=building,
            host_running=running,
            host_waiting_prompt_tokens=tokens,
        )
