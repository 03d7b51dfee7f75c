"""Liveness, readiness and metrics: open to probes and to Prometheus, without a key."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.api.deps import Using
from gateway.errors import Unavailable

router = APIRouter(tags=["Operations"])


@router.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Every model can serve")
async def readyz(services: Using) -> dict[str, str]:
    if not services.pool.ready:
        raise Unavailable("models are still loading", code="not_ready", retry_after=1.0)
    return {"status": "ready"}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(services: Using) -> Response:
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
