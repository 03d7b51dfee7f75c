"""A whole gateway over the stand-in model: real pool, policies, predictor, admission and API."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from gateway.api.deps import Services
from gateway.app import make_app
from gateway.config import FakeModel, Limits, Model, Settings
from gateway.engine.base import GenerationRequest
from gateway.engine.fake import FakeEngine, FakeSpeed, Fault
from gateway.metrics import Metrics
from gateway.policy.admission import Admission
from gateway.policy.policy import Policy
from gateway.policy.predictor import Predictor
from gateway.policy.quota import Quotas
from gateway.policy.store import PolicyStore
from gateway.variants.backend import Loaded
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.pool import VariantPool

LEVELS = ("int8", "int4-gptq-g128")
MODEL = "fake"
OPEN = Policy(name="default", build=False)


class Documents:
    """Documents kept in a dict, for one replica."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}
        self._watchers: list[tuple[str, Callable[..., None]]] = []

    async def put(self, namespace: str, name: str, document: dict[str, Any]) -> None:
        await self.update(namespace, name, lambda _: document)

    async def update(
        self,
        namespace: str,
        name: str,
        change: Callable[[dict[str, Any] | None], dict[str, Any]],
    ) -> dict[str, Any]:
        document = self.kept[namespace, name] = change(self.kept.get((namespace, name)))
        for space, callback in self._watchers:
            if space == namespace:
                callback(name, document)
        return document

    async def delete(self, namespace: str, name: str) -> None:
        self.kept.pop((namespace, name), None)
        for space, callback in self._watchers:
            if space == namespace:
                callback(name, None)

    async def all(self, namespace: str) -> dict[str, dict[str, Any]]:
        return {name: doc for (space, name), doc in self.kept.items() if space == namespace}

    async def watch(self, namespace: str, callback: Callable[..., None]) -> None:
        self._watchers.append((namespace, callback))


class WatchedBackend(FakeBackend):
    """The stand-in model with engines whose requests are kept and whose faults can be set."""

    def __init__(self, options: FakeModel, speed: FakeSpeed, model: str = MODEL) -> None:
        super().__init__(Model(id=model, path="fake", fake=options), LEVELS)
        self.speed = speed
        self.max_running = speed.max_running
        self.seen: list[GenerationRequest] = []
        self.fault: Fault | None = None

    async def load(self, level: str) -> Loaded | None:
        loaded = await super().load(level)
        if loaded is None:
            return None
        return Loaded(FakeEngine(self.speed, self._watch), loaded.resident_bytes, 0.0)

    def _watch(self, request: GenerationRequest, done: int) -> Exception | None:
        if done == 0:
            self.seen.append(request)
        return self.fault(request, done) if self.fault else None


class Gateway:
    """Settings of one test gateway, and its parts once it is open."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        speed: FakeSpeed | None = None,
        options: FakeModel | None = None,
        models: tuple[str, ...] = (MODEL,),
    ) -> None:
        self.settings = settings or make_settings()
        self.speed = speed or FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=0.2)
        self.options = options or FakeModel(tpot_ms=0.2)
        self.models = models
        self.quotas = Quotas()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FastAPI]:
        self.backends = [WatchedBackend(self.options, self.speed, name) for name in self.models]
        self.metrics = Metrics()
        self.pool = VariantPool(
            self.backends, memory_budget=10**9, max_jobs=4, on_job=self.metrics.job_changed
        )
        self.metrics.watch(self.pool)
        store = PolicyStore(self.settings.policies, Documents(), audience=self.metrics)
        await store.load()
        await self.pool.open()
        await self.pool.load_defaults()
        self.admission = Admission(self.settings.limits, watch=self.metrics)
        self.services = Services(
            settings=self.settings,
            pool=self.pool,
            policies=store,
            predictor=Predictor(),
            admission=self.admission,
            metrics=self.metrics,
            quotas=self.quotas,
        )
        try:
            yield make_app(self.services)
        finally:
            await store.close()
            await self.pool.close()

    @property
    def backend(self) -> WatchedBackend:
        return self.backends[0]

    def settles(self, seconds: float = 10.0) -> bool:
        """Does it become idle? (An answer reaches its caller just before its end is booked.)"""
        until = time.monotonic() + seconds
        while not self.idle() and time.monotonic() < until:
            time.sleep(0.002)
        return self.idle()

    def idle(self) -> bool:
        """Nothing is held: no permit, no lease, no sequence."""
        facts = [level for name in self.models for level in self.pool.snapshot(name).levels]
        busy = [f for f in facts if f.leases or f.stats.running or f.stats.waiting]
        return not busy and self.admission.in_flight == 0


def make_settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "models": (Model(id=MODEL, path="fake"),),
        "policies": (OPEN,),
        "limits": Limits(max_body_bytes=64 * 1024),
    }
    return Settings(**(values | changes))
