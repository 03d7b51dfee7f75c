"""The console at `/`: one static page that talks to the public API. No templates, no state."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter(include_in_schema=False)

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    return _file("console.html", "text/html")


@router.get("/console.js")
async def script() -> Response:
    return _file("console.js", "text/javascript")


@router.get("/console.css")
async def style() -> Response:
    return _file("console.css", "text/css")


@router.get("/favicon.ico")
async def icon() -> Response:
    return Response(status_code=204)


def _file(name: str, media_type: str) -> Response:
    return Response(_read(name), media_type=media_type, headers=_HEADERS)


@lru_cache
def _read(name: str) -> bytes:
    return (files("gateway.api") / "static" / name).read_bytes()
