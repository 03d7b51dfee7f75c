"""The composition root: the only place where parts are created and wired together.

`open_backends` opens what works without a server (cache, cards, models), `open_gateway` adds the
pool, the policies and the engine, `make_app` puts HTTP in front.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from blake3 import blake3
from fastapi import FastAPI

from cache.disk import DiskStore, Event
from cache.documents import Documents
from cache.errors import CacheError
from cache.redis import RedisStore
from cache.single_flight import SingleFlight
from cache.tiered import ArtifactStore
from cache.tiered import Tier as FetchTier
from compressors.recipe import RecipeError, expand
from gateway.api import console, decisions, explain, health, levels, openai, policies
from gateway.api.auth import AuthMiddleware
from gateway.api.deps import Services
from gateway.api.front import FrontMiddleware
from gateway.api.limits import BodyLimitMiddleware
from gateway.api.problems import install_error_handlers
from gateway.checks import check_memory, check_speculate, check_texts
from gateway.config import BUILTIN, DEFAULT_LEVELS, LADDERS, SPECULATE, Model, Settings
from gateway.errors import ConfigError, ModelError, PressgateError
from gateway.metrics import Metrics, Tier
from gateway.policy.admission import Admission
from gateway.policy.card_predictor import CardPredictor
from gateway.policy.predictor import Predictor
from gateway.policy.quota import Counters, MemoryCounters, Quotas, RedisCounters
from gateway.policy.store import PolicyStore
from gateway.quality.shadow import Answer, Score, Shadow
from gateway.recording import open_ledger, open_tracing
from gateway.variants.backend import Backend
from gateway.variants.cards import CardBook, conditions
from gateway.variants.fake_backend import FakeBackend
from gateway.variants.local_backend import LocalBackend
from gateway.variants.pool import VariantPool
from gateway.variants.shared import Runtime, Shared

log = logging.getLogger(__name__)

_SHADOW_WAIT_S = 60.0
_RETRY_SECONDS = 30.0
_QUOTA_SECONDS = 0.25  # longest wait for Redis to count a request
_USAGE_SECONDS = 10.0  # how often cache sizes are read for the metrics


@dataclass(frozen=True, slots=True)
class Parts:
    """What exists before anything is served."""

    backends: tuple[Backend, ...]
    documents: Documents
    cards: CardBook
    store: ArtifactStore
    runtime: Runtime
    metrics: Metrics
    redis: RedisStore | None


@asynccontextmanager
async def open_backends(settings: Settings) -> AsyncIterator[Parts]:
    """Cache, cards and models; nothing is loaded yet.

    Raises:
        ConfigError, ModelError: the configuration or a model cannot be used.
    """
    await asyncio.to_thread(check_texts, settings)
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        redis = _redis(settings, metrics)
        if redis is not None:
            stack.push_async_callback(redis.close)
            await redis.start()
        try:
            disk = await asyncio.to_thread(
                DiskStore,
                settings.cache.root,
                settings.cache.disk_budget,
                on_event=_watch_tier(metrics, "disk"),
            )
        except (CacheError, OSError) as error:
            raise ConfigError(f"cache.dir: {error}", param="cache.dir") from error
        store = ArtifactStore(disk, redis, on_hit=_watch_redis_hits(metrics) if redis else _ignore)
        stack.push_async_callback(store.close)
        documents = Documents(settings.cache.root, redis)
        stack.push_async_callback(documents.close)
        runtime = Runtime(settings)
        stack.push_async_callback(runtime.close)
        cards = CardBook(documents, await asyncio.to_thread(_conditions, settings, runtime))
        await cards.start()
        flight = SingleFlight(redis, settings.cache.root)
        stack.push_async_callback(flight.close)
        shared = Shared(
            settings=settings,
            store=store,
            flight=flight,
            cards=cards,
            runtime=runtime,
            on_event=_watch_tier(metrics, "disk"),
        )
        backends = [
            await _backend(model, await _ladder(model, settings, documents), shared)
            for model in settings.models
        ]
        yield Parts(tuple(backends), documents, cards, store, runtime, metrics, redis)


@asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncIterator[Services]:
    """Everything the HTTP front needs. Default levels load in the background: see `pool.ready`.

    Raises:
        ConfigError, ModelError: the configuration or a model cannot be used.
    """
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(open_backends(settings))
        metrics = parts.metrics
        pool = VariantPool(
            parts.backends,
            memory_budget=settings.memory_budget,
            max_jobs=settings.build.max_jobs,
            kv_budget=parts.runtime.kv_budget,
            kv_bytes=lambda: parts.runtime.kv_bytes,
            on_job=metrics.job_changed,
            on_load=metrics.loaded,
        )
        stack.push_async_callback(pool.close)
        await pool.open()
        check_memory(settings, parts.backends)
        for model in settings.models:
            for level in model.pinned:
                pool.keep(model.id, level)
        parts.cards.listen(_learn(pool, parts.backends))
        metrics.watch(pool)
        policy_store = PolicyStore(settings.policies, parts.documents, audience=metrics)
        await policy_store.load()
        stack.push_async_callback(policy_store.close)
        shadow = _shadow(settings, pool, metrics)
        ledger = await stack.enter_async_context(open_ledger(settings, pool, metrics, parts.redis))
        traces = await stack.enter_async_context(open_tracing(settings, pool))
        for work in (_start_up(pool, settings), _report_usage(parts), shadow.run()):
            task = asyncio.create_task(work)
            stack.callback(task.cancel)
        yield Services(
            settings=settings,
            pool=pool,
            policies=policy_store,
            predictor=Predictor() if settings.predict == "live" else CardPredictor(),
            admission=_admission(settings, metrics),
            quotas=_quotas(settings, metrics, stack),
            metrics=metrics,
            shadow=shadow,
            ledger=ledger,
            traces=traces,
        )


def _shadow(settings: Settings, pool: VariantPool, metrics: Metrics) -> Shadow:
    """Live quality through the pool's dense levels; with rate 0 it never takes an answer."""

    def on_score(answer: Answer, score: Score) -> None:
        metrics.shadowed(answer.model, answer.level, score.tokens, score.agreeing, score.nll_nats)

    return Shadow(
        settings.shadow.rate,
        lambda model: pool.lease(model, pool.default_level(model), wait_s=_SHADOW_WAIT_S),
        on_score,
    )


def make_app(services: Services) -> FastAPI:
    """The HTTP front over open services."""
    app = FastAPI(title="Pressgate", version=version("pressgate"), docs_url="/docs", redoc_url=None)
    app.state.services = services
    for module in (openai, explain, decisions, levels, policies, health, console):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(FrontMiddleware, services=services)
    app.add_middleware(BodyLimitMiddleware, max_bytes=services.settings.limits.max_body_bytes)
    app.add_middleware(AuthMiddleware, keys=services.settings.api_keys)
    return app


def _admission(settings: Settings, metrics: Metrics) -> Admission:
    own = {key.name: key.max_concurrent for key in settings.api_keys if key.max_concurrent}
    return Admission(settings.limits, watch=metrics, shares=own)


def _quotas(settings: Settings, metrics: Metrics, stack: AsyncExitStack) -> Quotas:
    """Counted in Redis where there is one, so that replicas share them."""
    quotas = {key.name: key.quota for key in settings.api_keys if any(dict(key.quota).values())}
    counters: Counters = MemoryCounters()
    url = settings.cache.redis_url
    if quotas and url is not None:
        from redis.asyncio import Redis

        wait_s = min(_QUOTA_SECONDS, settings.cache.redis_timeout_seconds)
        client = Redis.from_url(
            url.get_secret_value(), socket_timeout=wait_s, socket_connect_timeout=wait_s
        )
        stack.push_async_callback(client.aclose)
        counters = RedisCounters(client)
    return Quotas(quotas, counters, on_refusal=metrics.quota_refused)


def _conditions(settings: Settings, runtime: Runtime) -> str:
    """What a card measured here depends on besides the artifact."""
    text = settings.build.eval_text
    return conditions(
        device=runtime.device,
        threads=runtime.threads,
        dtype=settings.dtype,
        eval_text=blake3(text.read_bytes()).hexdigest() if text is not None else "",
    )


def _redis(settings: Settings, metrics: Metrics) -> RedisStore | None:
    cache = settings.cache
    metrics.redis_up(False)
    if cache.redis_url is None:
        return None
    try:
        return RedisStore(
            cache.redis_url.get_secret_value(),
            budget=cache.redis_budget,
            ttl=cache.redis_ttl_seconds,
            variant_limit=cache.redis_variant_limit,
            timeout=cache.redis_timeout_seconds,
            on_state=metrics.redis_up,
            on_event=_watch_tier(metrics, "redis"),
        )
    except ValueError as error:
        raise ConfigError(f"cache.redis_url: {error}", param="cache.redis_url") from None


def _watch_tier(metrics: Metrics, tier: Tier) -> Callable[[Event, str], None]:
    counted = {
        Event.HIT: metrics.cache_hit,
        Event.MISS: metrics.cache_miss,
        Event.EVICTION: metrics.cache_evicted,
        Event.CORRUPTION: metrics.cache_corrupted,
    }

    def count(event: Event, _what: str) -> None:
        counted[event](tier)

    return count


def _watch_redis_hits(metrics: Metrics) -> Callable[[FetchTier], None]:
    """The disk counts for itself; what it lacked was found in Redis or nowhere."""

    def count(tier: FetchTier) -> None:
        if tier == "redis":
            metrics.cache_hit("redis")
        elif tier == "miss":
            metrics.cache_miss("redis")

    return count


def _ignore(_tier: FetchTier) -> None:
    """Without Redis there is nothing to count here."""


async def _ladder(model: Model, settings: Settings, documents: Documents) -> tuple[str, ...]:
    """The level names of a model: as configured, or with `auto` as the last search found them."""
    if settings.levels != "auto":
        return settings.levels
    found = await documents.get(LADDERS, model.id) or {}
    return tuple(str(name) for name in found.get("levels", ())) or DEFAULT_LEVELS


async def _backend(model: Model, names: tuple[str, ...], shared: Shared) -> Backend:
    try:
        names = expand(names)
    except RecipeError as error:
        raise ConfigError(f"levels: {error}", param="levels") from None
    check_speculate(shared.settings, names)
    if model.fake is not None or model.path == "fake":
        return FakeBackend(model, names)
    from compressors.checkpoint import CheckpointError, resolve

    try:
        path = BUILTIN if model.path == "builtin" else model.path
        folder = await asyncio.to_thread(resolve, path, model.revision)
    except CheckpointError as error:
        raise ModelError(str(error), param="models.path") from error
    return LocalBackend(model, shared, folder, names)


def _learn(pool: VariantPool, backends: tuple[Backend, ...]) -> Callable[[str], None]:
    """A card that arrives tells of an artifact another replica made."""

    def learned(key: str) -> None:
        for backend in backends:
            if isinstance(backend, LocalBackend):
                pool.learned(backend.model, backend.levels_of(key))

    return learned


async def _start_up(pool: VariantPool, settings: Settings) -> None:
    """Load default levels, trying again until it works; then build what the configuration wants."""
    while True:
        try:
            await pool.load_defaults()
            break
        except PressgateError as error:
            log.error("start-up: %s; trying again in %.0f s", error.message, _RETRY_SECONDS)
            await asyncio.sleep(_RETRY_SECONDS)
    for served in settings.models:
        for level in served.pinned:
            await _pin(pool, served.id, level)
    draft = settings.engine.speculate
    if draft not in SPECULATE:
        for model in pool.models():
            await _pin(pool, model, draft)
    if settings.build.prebuild:
        for model in pool.models():
            await pool.build_missing(model)


async def _pin(pool: VariantPool, model: str, level: str) -> None:
    """The gateway serves all the same without it."""
    try:
        await pool.pin(model, level)
    except PressgateError as error:
        log.warning("%s@%s is not kept in memory: %s", model, level, error.message)


async def _report_usage(parts: Parts) -> None:
    """Keep the cache's size gauges fresh without reading the disk on every scrape."""
    while True:
        try:
            usage = await parts.store.usage()
        except CacheError as error:
            log.warning("cannot read the cache's size: %s", error)
        else:
            parts.metrics.cache_bytes("disk", usage.disk.total_bytes)
            if usage.redis is not None:
                parts.metrics.cache_bytes("redis", usage.redis.blob_bytes)
        await asyncio.sleep(_USAGE_SECONDS)
