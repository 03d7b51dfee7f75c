"""Levels, memory and build jobs: what exists, and an operator's build, warm, pin and evict."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from gateway.api.deps import Using, one_model
from gateway.errors import NotFound
from gateway.variants.jobs import Job
from gateway.variants.variant import LevelFacts

router = APIRouter(tags=["Pressgate"])

_Model = Annotated[str | None, Query(max_length=256, description="needed with several models")]


@router.get("/v1/levels", summary="The ladder: size, speed, quality and state of every level")
async def levels(services: Using, model: _Model = None) -> dict[str, Any]:
    pool = services.pool
    names = pool.models() if model is None else [one_model(pool, model)]
    data = [level_row(name, facts) for name in names for facts in pool.snapshot(name).levels]
    return {
        "object": "list",
        "memory_budget_bytes": pool.memory_budget,
        "memory_used_bytes": pool.memory_used(),
        "data": data,
    }


@router.post("/v1/levels/{name}:build", status_code=202, summary="Build a level that is absent")
async def build(name: str, services: Using, model: _Model = None) -> dict[str, Any]:
    """Starts the build or joins the one under way; follow it at `/v1/jobs/{id}`."""
    target = one_model(services.pool, model)
    job = await services.pool.request_build(target, name, reason="asked for by an operator")
    return job_row(job)


@router.post("/v1/levels/{name}:warm", summary="Load a level into memory")
async def warm(name: str, services: Using, model: _Model = None) -> dict[str, Any]:
    """Answers when the level is ready to serve; builds it first if need be."""
    target = one_model(services.pool, model)
    await services.pool.warm(target, name)
    return _one(services, target, name)


@router.post("/v1/levels/{name}:evict", summary="Unload a level from memory")
async def evict(
    name: str,
    services: Using,
    model: _Model = None,
    delete: Annotated[bool, Query(description="forget the stored artifact too")] = False,
) -> dict[str, Any]:
    """Refused (409) while requests use it."""
    target = one_model(services.pool, model)
    await services.pool.evict(target, name, delete=delete)
    return _one(services, target, name)


@router.post("/v1/levels/{name}:pin", summary="Load a level and keep it in memory")
async def pin(name: str, services: Using, model: _Model = None) -> dict[str, Any]:
    """It stays until `:unpin` or a restart, whatever else needs room; refused (409) when pinned
    levels would take more than there is for weights."""
    target = one_model(services.pool, model)
    await services.pool.pin(target, name)
    return _one(services, target, name)


@router.post("/v1/levels/{name}:unpin", summary="Let a pinned level leave when room is needed")
async def unpin(name: str, services: Using, model: _Model = None) -> dict[str, Any]:
    target = one_model(services.pool, model)
    services.pool.unpin(target, name)
    return _one(services, target, name)


@router.get("/v1/memory", summary="What is in memory, what it is worth, who would leave first")
async def memory(services: Using) -> dict[str, Any]:
    return {"object": "memory", **services.pool.memory_plan()}


@router.get("/v1/jobs", summary="Builds: queued, running and the last ones finished")
async def jobs(services: Using) -> dict[str, Any]:
    return {"object": "list", "data": [job_row(job) for job in reversed(services.pool.jobs())]}


@router.get("/v1/jobs/{job_id}", summary="One build")
async def job(job_id: str, services: Using) -> dict[str, Any]:
    return job_row(services.pool.job(job_id))


def level_row(model: str, facts: LevelFacts) -> dict[str, Any]:
    """One level for people and programs; the card's fields keep their names."""
    stats = facts.stats
    return {
        "model": model,
        "level": facts.level,
        "family": facts.family,
        "state": facts.state,
        "error": facts.error,
        "leases": facts.leases,
        "pinned": facts.pinned,
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        **facts.card.model_dump(mode="json"),
    }


def job_row(entry: Job) -> dict[str, Any]:
    return {"object": "job", **asdict(entry)}


def _one(services: Using, model: str, name: str) -> dict[str, Any]:
    facts = services.pool.snapshot(model).level(name)
    if facts is None:
        raise NotFound(f"{model} has no level {name!r}", param="level", code="level_not_found")
    return level_row(model, facts)
