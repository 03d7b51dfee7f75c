"""Talking to a running gateway from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gateway.errors import InvalidRequest

_TIMEOUT_S = 60.0


def call(method: str, url: str, path: str, key: str | None, body: Any = None) -> Any:
    """The JSON answer of one request (None for an empty answer).

    Raises:
        InvalidRequest: the gateway is not there, is no gateway or refuses; its own words are kept.
    """
    import httpx  # only these commands need it; `serve` starts without

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.request(
            method, url.rstrip("/") + path, headers=headers, json=body, timeout=_TIMEOUT_S
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InvalidRequest(f"--url: {url} does not answer: {error}", param="url") from None
    if response.is_success:
        try:
            return response.json() if response.content else None
        except ValueError:
            raise _stranger(url) from None
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:300]
    raise InvalidRequest(f"{url} answered {response.status_code}: {message}")


@contextmanager
def gateway_answers(url: str) -> Iterator[None]:
    """Around reading an answer's fields: another server's JSON lacks them.

    Raises:
        InvalidRequest: naming `--url`.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _stranger(url) from None


def _stranger(url: str) -> InvalidRequest:
    return InvalidRequest(f"--url: {url} does not answer as a Pressgate gateway", param="url")
