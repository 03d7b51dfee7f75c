"""The pool: the one owner of every variant's state, memory and leases.

Only this file and `builder` move a variant from one `State` to another. All mutation happens on the
event loop between two awaits, so there are no locks: asking and acting are one step (`lease`). Work
that takes time is a task per variant that later callers join. What to load or build is decided
elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from gateway.engine.base import Engine, EngineFailed, TextCodec
from gateway.errors import Conflict, Overloaded, Unavailable
from gateway.variants.backend import Backend
from gateway.variants.builder import Builder
from gateway.variants.entry import RETRY_FAILED_AFTER, Variant, reraise
from gateway.variants.jobs import Job, JobBoard
from gateway.variants.room import Room
from gateway.variants.roster import Roster
from gateway.variants.variant import LadderSnapshot, State

log = logging.getLogger(__name__)


class VariantPool:
    """Levels of every model under one byte budget for weights and KV.

    Of `memory_budget` bytes, `kv_budget` are kept free for KV pools, whose present size `kv_bytes`
    tells; weights share the rest.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        memory_budget: int,
        max_jobs: int,
        kv_budget: int = 0,
        kv_bytes: Callable[[], int] = lambda: 0,
        on_job: Callable[[Job], None] = lambda _job: None,
        on_load: Callable[[str, str, float], None] = lambda _model, _level, _seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roster = Roster(
            backends, memory_budget=memory_budget, kv_budget=kv_budget, kv_bytes=kv_bytes
        )
        self._room = Room(self._roster, clock)
        self._builder = Builder(JobBoard(max_jobs, on_job), self._made, clock)
        self._on_load = on_load
        self._clock = clock
        self._load_turn = asyncio.Lock()  # one load at a time, so that memory is counted once
        self._closing = False
        self._loaded_defaults = False

    # -- life -------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open every backend and see which levels are stored. Raises: ModelError."""
        for backend in self._roster.backends:
            await backend.start()
            variants = [Variant(backend, spec) for spec in backend.ladder()]
            for variant in variants:
                if await backend.stored(variant.spec.level):
                    variant.state = State.STORED
            self._roster.add(backend, variants)

    async def load_defaults(self) -> None:
        """Load every model's default level, then measure it if this host never has. Raises:
        Unavailable, Overloaded."""
        for backend in self._roster.backends:
            await self.warm(backend.model, backend.default_level)
        self._loaded_defaults = True
        for backend in self._roster.backends:
            variant = self._roster.variant(backend.model, backend.default_level)
            if not backend.card(backend.default_level).measured and variant.building is None:
                await self._builder.measure(variant)

    async def build_missing(self, model: str) -> None:
        """Build every absent level of the ladder, one after the other; failures are left marked."""
        for variant in self._roster.of(model):
            if variant.state is State.ABSENT:
                task = self._builder.ensure(variant, "prebuild")
                await asyncio.wait({task})

    async def close(self) -> None:
        """Stop builds and loads, free every engine."""
        self._closing = True
        self._builder.close()
        for variant in self._roster.all():
            for task in (variant.loading, variant.building, variant.unloading):
                if task is not None:
                    if task is not variant.unloading:
                        task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            if variant.engine is not None:
                await self._unload(variant)
        for backend in self._roster.backends:
            await backend.close()

    # -- facts ------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Every model's default level has been loaded; unloading one for room does not unready."""
        return self._loaded_defaults and not self._closing

    @property
    def memory_budget(self) -> int:
        return self._roster.memory_budget

    @property
    def memory_evictions(self) -> int:
        """Levels that left for others so far."""
        return self._room.evictions

    def memory_plan(self) -> dict[str, Any]:
        """What each level in memory is worth and which would leave first; see `Room.plan`."""
        return self._room.plan()

    def memory_used(self) -> int:
        """Bytes of weights resident or being loaded, plus KV pools that exist."""
        return self._roster.memory_used()

    def models(self) -> list[str]:
        return self._roster.models()

    def tokenizer(self, model: str) -> TextCodec:
        return self._roster.backend(model).tokenizer

    def context_length(self, model: str) -> int:
        return self._roster.backend(model).context_length

    def default_level(self, model: str) -> str:
        return self._roster.backend(model).default_level

    def snapshot(self, model: str) -> LadderSnapshot:
        """The ladder of `model` now, best quality first.

        Raises:
            NotFound: unknown model.
        """
        return self._roster.snapshot(model, self._clock(), closely=True)

    def glance(self, model: str) -> LadderSnapshot:
        """The same for a decision, quicker: facts are described anew only where they changed. Of a
        level without work, the engine's counters may be older.

        Raises:
            NotFound: unknown model.
        """
        return self._roster.snapshot(model, self._clock(), closely=False)

    def jobs(self) -> list[Job]:
        return self._builder.board.all()

    def job(self, job_id: str) -> Job:
        return self._builder.board.get(job_id)

    # -- acts -------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, model: str, level: str, *, wait_s: float) -> AsyncIterator[Engine]:
        """Hold a level ready while the block runs; loads or builds it first, joining such work.

        Raises:
            NotFound: unknown model or level.
            Unavailable: not ready within `wait_s` seconds, failed, or no memory for it.
        """
        variant = self._roster.variant(model, level)
        engine = await self._acquire(variant, wait_s)
        try:
            yield engine
        except EngineFailed as error:
            self._fail(variant, engine, f"engine failed: {error}")
            raise
        finally:
            variant.leases -= 1
            variant.last_used = self._clock()

    async def request_build(self, model: str, level: str, *, reason: str) -> Job:
        """Start (or join) the build of an absent level and return its job at once.

        Raises:
            NotFound: unknown model or level.
            Conflict: the level is there already.
            Overloaded: too many builds.
        """
        variant = self._roster.variant(model, level)
        if not variant.needs_build:
            raise Conflict(f"{variant.name} is {variant.state} already", param="level")
        self._builder.ensure(variant, reason)
        assert variant.job_id is not None
        return self._builder.board.get(variant.job_id)

    async def wait_ready(self, model: str, level: str, timeout_s: float) -> None:
        """Wait until a level that is building or loading is ready.

        Raises:
            Unavailable: not within `timeout_s`, or its build failed.
        """
        await self._make_ready(self._roster.variant(model, level), timeout_s)

    async def warm(self, model: str, level: str) -> None:
        """Load a level (building it first if need be) and keep it loaded until memory is needed."""
        await self._make_ready(self._roster.variant(model, level), wait_s=3600.0)

    def keep(self, model: str, level: str) -> None:
        """Let a level stay in memory once it is there, whatever else needs room.

        Raises:
            NotFound: unknown model or level.
            Conflict: levels kept so would take more than there is for weights.
        """
        variant = self._roster.variant(model, level)
        self._room.check_pin(variant)
        variant.pinned = True

    async def pin(self, model: str, level: str) -> None:
        """`keep` a level and load it now.

        Raises:
            NotFound, Conflict: see `keep`.
            Unavailable, Overloaded: it cannot be loaded; it stays as it was.
        """
        variant = self._roster.variant(model, level)
        before = variant.pinned
        self.keep(model, level)
        try:
            await self._make_ready(variant, wait_s=3600.0)
        except BaseException:
            variant.pinned = before
            raise

    def unpin(self, model: str, level: str) -> None:
        """Let a pinned level leave when room is needed."""
        self._roster.variant(model, level).pinned = False

    async def evict(self, model: str, level: str, *, delete: bool = False) -> None:
        """Unload a level; `delete` also forgets its artifact.

        Raises:
            Conflict: it is pinned, requests hold it, or it is being built or loaded.
        """
        variant = self._roster.variant(model, level)
        if variant.pinned:
            raise Conflict(f"{variant.name} is pinned; unpin it first", param="level")
        if variant.leases:
            raise Conflict(f"{variant.name} serves {variant.leases} requests now", param="level")
        if variant.state in (State.BUILDING, State.LOADING, State.DRAINING):
            raise Conflict(f"{variant.name} is {variant.state} now", param="level")
        if delete:
            for other in self._roster.alike(variant):
                if other.state not in (State.STORED, State.ABSENT, State.FAILED):
                    raise Conflict(
                        f"{variant.name} is stored together with {other.name}, "
                        f"which is {other.state} now; evict that first",
                        param="level",
                    )
        if variant.engine is not None or delete:
            await self._unload(variant, delete=delete)

    def learned(self, model: str, levels: Iterable[str]) -> None:
        """Another replica made these levels: they can be loaded from the shared cache."""
        for level in levels:
            variant = self._roster.find(model, level)
            if variant is not None and variant.state in (State.ABSENT, State.FAILED):
                variant.state, variant.error = State.STORED, None

    # -- inside -----------------------------------------------------------------------------

    def _made(self, variant: Variant) -> None:
        """An artifact was built: other levels that live in it can be loaded too."""
        self.learned(variant.backend.model, (v.spec.level for v in self._roster.alike(variant)))

    async def _acquire(self, variant: Variant, wait_s: float) -> Engine:
        """Count a lease on a ready engine. No await between seeing READY and counting."""
        if variant.state is not State.READY:
            await self._make_ready(variant, wait_s)
        assert variant.engine is not None
        variant.leases += 1
        variant.demand.count(self._clock())
        return variant.engine

    async def _make_ready(self, variant: Variant, wait_s: float) -> None:
        """Drive the variant to READY. Returns only in the same loop step in which it is READY.

        Raises:
            Unavailable: it did not get there in time or cannot.
        """
        until = self._clock() + wait_s
        while variant.state is not State.READY:
            if self._closing:
                raise Unavailable("the gateway is shutting down", retry_after=5.0)
            task = self._next_step(variant)
            # wait() leaves the task alone when this caller gives up or is cancelled
            done, _ = await asyncio.wait({task}, timeout=max(0.0, until - self._clock()))
            if not done:
                raise Unavailable(
                    f"{variant.name} is {variant.state} and was not ready in {wait_s:.0f} s",
                    retry_after=self._builder.ready_in(variant),
                )
            reraise(task, variant.name)

    def _next_step(self, variant: Variant) -> asyncio.Task[None]:
        """The task that brings the variant one state nearer to READY; started if there is none."""
        if variant.state is State.FAILED:
            waited = self._clock() - variant.failed_at
            if waited < RETRY_FAILED_AFTER:
                raise Unavailable(
                    f"{variant.name} failed: {variant.error}",
                    retry_after=RETRY_FAILED_AFTER - waited,
                )
        if variant.unloading is not None:
            return variant.unloading
        if variant.needs_build:
            return self._builder.ensure(variant, "requested")
        if variant.loading is None:
            variant.state = State.LOADING
            variant.loading = asyncio.create_task(self._load(variant), name=f"load {variant.name}")
        return variant.loading

    async def _load(self, variant: Variant) -> None:
        try:
            async with self._load_turn:
                variant.resident_bytes = variant.backend.load_bytes(variant.spec.level)
                await self._make_room(variant)
                loaded = await variant.backend.load(variant.spec.level)
            if loaded is None:
                log.warning("%s is gone from the cache: it will be built again", variant.name)
                variant.resident_bytes = 0
                variant.state = State.ABSENT
                return
            variant.engine, variant.resident_bytes = loaded.engine, loaded.resident_bytes
            variant.held, variant.error = loaded.held, None
            variant.load_s = loaded.load_seconds
            variant.last_used = self._clock()
            variant.state = State.READY
            self._on_load(variant.backend.model, variant.spec.level, loaded.load_seconds)
            log.info("%s ready in %.2f s", variant.name, loaded.load_seconds)
        except (asyncio.CancelledError, Overloaded):
            variant.resident_bytes, variant.state = 0, State.STORED
            raise
        except Exception as error:
            log.exception("loading %s", variant.name)
            variant.resident_bytes = 0
            variant.fail(f"{type(error).__name__} while loading", self._clock())
            raise
        finally:
            variant.loading = None

    async def _make_room(self, variant: Variant) -> None:
        """Unload what is worth least until `variant`'s bytes fit, looking anew after each: requests
        may have taken one meanwhile.

        Raises:
            Overloaded: what stays is leased or pinned and leaves no room.
        """
        while (least := self._room.next_to_leave(variant)) is not None:
            await self._unload(least)

    async def _unload(self, variant: Variant, *, delete: bool = False) -> None:
        """Free an unleased engine; whoever wants the level meanwhile waits for the task."""
        variant.state = State.DRAINING
        variant.unloading = asyncio.create_task(self._drain(variant, delete))
        await asyncio.shield(variant.unloading)

    async def _drain(self, variant: Variant, delete: bool) -> None:
        stored = True
        try:
            if variant.engine is not None:
                await variant.engine.close()
            if delete:
                await variant.backend.delete(variant.spec.level)
                stored = await variant.backend.stored(variant.spec.level)
        finally:
            variant.drop()
            variant.unloading = None
            variant.state = State.STORED if stored else State.ABSENT
            for other in self._roster.alike(variant) if not stored else ():
                if other.state is State.STORED:
                    other.state = State.ABSENT

    def _fail(self, variant: Variant, engine: Engine, why: str) -> None:
        """An engine died under a request: drop it; the next request loads it afresh."""
        if variant.engine is not engine:
            return  # another request saw it first, and a new engine may serve already
        log.error("%s: %s", variant.name, why)
        variant.drop()
        variant.state, variant.error = State.STORED, why
        closing = asyncio.get_running_loop().create_task(engine.close())
        closing.add_done_callback(lambda task: task.cancelled() or task.exception())
