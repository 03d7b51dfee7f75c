"""Who calls: API keys and scopes, as pure ASGI middleware. Knows digests only, never secrets.

Without configured keys the gateway is open (the configuration allows that on loopback only), but a
foreign web page still may not act on it: browsers' cross-site writes are refused.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.problems import send_error
from gateway.config import ApiKey, Floors
from gateway.errors import Forbidden, PressgateError, Unauthorized

ScopeName = Literal["inference", "admin"]

_OPEN = frozenset(
    {
        "/",
        "/console.js",
        "/console.css",
        "/favicon.ico",
        "/healthz",
        "/readyz",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
    }
)
_WRITES = ("POST", "PUT", "DELETE", "PATCH")
_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/explain")


_NO_FLOORS = Floors()


@dataclass(frozen=True, slots=True)
class Caller:
    """The key a request came with; None when the gateway is open."""

    key: str | None
    scopes: frozenset[str]
    floors: Floors = _NO_FLOORS


ANYONE = Caller(None, frozenset(("inference", "admin")))


class AuthMiddleware:
    """Puts a `Caller` into `scope["caller"]` or answers 401/403."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self._app = app
        self._keys = [
            (key.sha256.encode(), Caller(key.name, frozenset(key.scopes), key.floors))
            for key in keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["caller"] = self._caller(scope)
        except PressgateError as error:
            await send_error(send, error)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """
        Raises:
            Unauthorized: no key, or an unknown one. Forbidden: the key lacks the scope.
        """
        method, path = scope["method"], scope["path"]
        headers = dict(scope["headers"])
        if not self._keys:
            if method in _WRITES and headers.get(b"sec-fetch-site") == b"cross-site":
                raise Forbidden("cross-site requests are refused", code="cross_site")
            return ANYONE
        if path in _OPEN:
            return Caller(None, frozenset())
        caller = self._lookup(headers.get(b"authorization", b""))
        needed = _needed(method, path)
        if needed is not None and needed not in caller.scopes:
            raise Forbidden(f"this API key lacks the scope {needed!r}")
        return caller

    def _lookup(self, header: bytes) -> Caller:
        scheme, _, secret = header.partition(b" ")
        if scheme.lower() != b"bearer" or not secret:
            raise Unauthorized("an API key is needed: send `Authorization: Bearer KEY`")
        digest = hashlib.sha256(secret.strip()).hexdigest().encode()
        found: Caller | None = None
        for known, caller in self._keys:  # every key is compared: time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthorized("unknown API key")
        return found


def _needed(method: str, path: str) -> ScopeName | None:
    """Reading needs any key; generating needs `inference`; changing things needs `admin`."""
    if path in _GENERATING:
        return "inference"
    return "admin" if method in _WRITES else None
